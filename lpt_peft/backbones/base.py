"""Backbone: what the adapter must know of a ViT, and nothing more.

One implementation per ecosystem, in a file or a folder. Not here: how a block takes prompts
(`lpt_peft.prompting`) and what is trained (`lpt_peft.prompts`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lpt_peft.errors import BackboneError


class Stream(NamedTuple):
    """What flows through the blocks."""

    tokens: Tensor
    """(B, N, d), floating point."""
    context: Mapping[str, Any]
    """What every block is given besides the tokens (mask, rotary embedding); opaque to the adapter."""


@dataclass(frozen=True)
class BackboneInfo:
    """Which model this is, as far as the model itself tells; the fingerprint proves it."""

    library: str
    library_version: str
    architecture: str
    embed_dim: int
    depth: int
    num_heads: int
    num_parameters: int
    pretrained_tag: str | None = None
    hub_id: str | None = None
    hub_revision: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)


class Backbone(Protocol):
    """A ViT as the adapter drives it: embed, run blocks with prompts, pool.

    Attributes:
        model: The user's very object.
        blocks: Its `L` transformer blocks, in order.
        dim: Width `d` of the tokens.
        feature_dim: Width of what `pool` returns.
        num_classes: Classes of the model's own head; 0 where it has none.
        runs_own_forward: Whether `embed` and `pool` run the model's own forward, and with it what was put around that,
            such as accelerate's offloading.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    dim: int
    feature_dim: int
    num_classes: int
    runs_own_forward: bool

    def attach(self) -> None:
        """Let every block take prompts, check one of each class, or leave all as it was and raise.

        Raises:
            BackboneError: A block cannot take prompts; the message names its class.
        """

    def detach(self) -> None:
        """Give every module its original class back."""

    def embed(self, *args: Any, **kwargs: Any) -> Stream:
        """The model's own forward arguments to the tokens that enter block 1."""

    def run(self, stream: Stream, start: int, prompts: Sequence[Tensor]) -> Stream:
        """Blocks `start`, `start + 1`, ... one for each prompt, (n, d) or (B, n, d) floating point."""

    def pool(self, stream: Stream) -> Tensor:
        """Tokens after the last block to the pooled, normalised feature (B, feature_dim), without dropout."""

    def info(self) -> BackboneInfo:
        """What the prompt file says of the backbone."""

    def preprocess(self) -> dict[str, Any]:
        """input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode of the model's data configuration."""

    def frozen_tensors(self) -> Iterable[Tensor]:
        """Parameters and persistent buffers without the classification head: what the fingerprint covers."""


def refuse_offloaded(model: nn.Module) -> None:
    """Refuse a model whose weights accelerate brings in only while the model's own forward runs.

    Raises:
        BackboneError: It is one.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise BackboneError(
            f"This {type(model).__name__} is offloaded by accelerate (cpu_offload, device_map), which acts around the "
            "model's own forward, and that is not what runs here. Take the hooks away "
            "(accelerate.hooks.remove_hook_from_submodules(model)) and move the model with to(); or use a transformers "
            "model, which can be offloaded."
        )


def execution_device(model: nn.Module) -> torch.device:
    """Where a model computes: the device of its tensors, or of accelerate's hooks where these bring the tensors in."""
    device = next(model.parameters()).device
    if device.type == "meta":
        hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        device = torch.device(next((found for found in devices if found is not None), device))
    return device


def warn_of_multihead_lora(blocks: Iterable[nn.Module]) -> None:
    """Say what PEFT's LoRA around an nn.MultiheadAttention does to the fingerprint in prompt files."""
    parts = (part for block in blocks for part in block.modules())
    if any(isinstance(getattr(part, "base_layer", None), nn.MultiheadAttention) for part in parts):
        warnings.warn(
            "PEFT's LoRA on nn.MultiheadAttention adds its update to the weights and takes it away again at every "
            "forward, which moves their last bits: prompts are right, but a prompt file may not recognise its backbone "
            'again. Merge the LoRA before wrap (merge_and_unload()), or load with check_backbone="warn".',
            UserWarning,
            stacklevel=2,
        )
