"""Backbone: the interface between the adapter and a ViT of any library.

Each library has an implementation in its own file or folder. Not here: how a block takes prompts
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
from lpt_peft.prompting import Prompt


class Stream(NamedTuple):
    """Tokens and per-block context passed between blocks."""

    tokens: Tensor
    """(B, N, d), floating point."""
    context: Mapping[str, Any]
    """Further arguments of the blocks (mask, rotary embedding); the adapter does not read them."""


@dataclass(frozen=True)
class BackboneInfo:
    """Description of a model for prompt files; the fingerprint identifies its weights."""

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
    """Driver of a ViT: embed, run blocks with prompts, pool.

    Attributes:
        model: The user's model object.
        blocks: Its `L` transformer blocks, in order.
        dim: Width `d` of the tokens.
        feature_dim: Width of the output of `pool`.
        num_classes: Number of classes of the model's classifier; 0 if it has none.
        runs_own_forward: Whether `embed` and `pool` run the model's own forward, which accelerate's offloading needs.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    dim: int
    feature_dim: int
    num_classes: int
    runs_own_forward: bool

    def attach(self) -> None:
        """Let all blocks take prompts and check one block of each kind; an error leaves the model unchanged.

        Raises:
            BackboneError: A block cannot take prompts; the message names its class.
        """

    def detach(self) -> None:
        """Restore the original class of every module."""

    def embed(self, *args: Any, **kwargs: Any) -> Stream:
        """Compute the tokens that enter block 1 from the arguments of the model's forward."""

    def run(self, stream: Stream, start: int, prompts: Sequence[Prompt]) -> Stream:
        """Run blocks `start`, `start + 1`, ..., one per prompt (n, d) or (B, n, d), floating point; None: no prompt.

        An integer n in place of a prompt: the last n tokens are a prompt that blocks carry along.
        """

    def pool(self, stream: Stream) -> Tensor:
        """Compute the pooled, normalized feature (B, feature_dim) from the tokens after the last block."""

    def class_token(self, stream: Stream) -> Tensor | None:
        """Return the class token (B, d) among tokens between blocks, or None if the model has none."""

    def mean_patch(self, stream: Stream) -> Tensor:
        """Return the mean (B, d) of the patch tokens between blocks, without padding."""

    def plain_feature(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the feature of `pool` without prompts, from the arguments of the model's forward.

        It does not need `attach`.
        """

    def info(self) -> BackboneInfo:
        """Return the description of the model for prompt files."""

    def preprocess(self) -> dict[str, Any]:
        """Return input_size (C, H, W), mean, std, interpolation, crop_pct and crop_mode of the model's images."""

    def frozen_tensors(self) -> Iterable[Tensor]:
        """Return the tensors of the fingerprint: parameters and persistent buffers without the classifier."""


def masked_mean(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean (B, d) of the tokens (B, N, d) for which `valid` (B, N) is True; None: of all tokens."""
    if valid is None:
        return tokens.mean(1)
    weights = valid.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


def run_plain(backbone: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Implement `Backbone.plain_feature` by `embed`, `run` and `pool`."""
    stream: Stream = backbone.run(backbone.embed(*args, **kwargs), 0, [None] * len(backbone.blocks))
    feature: Tensor = backbone.pool(stream)
    return feature


def not_floating(images: Tensor) -> str:
    """Return the message for images of an integer dtype."""
    return (
        f"Images are {str(images.dtype).removeprefix('torch.')}; they must be floating point and normalized as in "
        "training. Convert them, for example by torchvision.transforms.v2.ToDtype(torch.float32, scale=True) and "
        "Normalize."
    )


def refuse_offloaded(model: nn.Module) -> None:
    """Refuse a model whose weights accelerate loads only while the model's own forward runs.

    Raises:
        BackboneError: The model has hooks of accelerate.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise BackboneError(
            f"This {type(model).__name__} is offloaded by accelerate (cpu_offload, device_map), whose hooks run around "
            "the model's own forward, which the adapter does not call. Remove the hooks "
            "(accelerate.hooks.remove_hook_from_submodules(model)) and move the model with to(); or use a transformers "
            "model, which can be offloaded."
        )


def execution_device(model: nn.Module) -> torch.device:
    """Return the device on which a model computes, also if accelerate offloads it."""
    device = next(model.parameters()).device
    if device.type == "meta":
        hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        device = torch.device(next((found for found in devices if found is not None), device))
    return device


def warn_of_multihead_lora(blocks: Iterable[nn.Module]) -> None:
    """Warn that PEFT's LoRA on an nn.MultiheadAttention changes the fingerprint in prompt files."""
    parts = (part for block in blocks for part in block.modules())
    if any(isinstance(getattr(part, "base_layer", None), nn.MultiheadAttention) for part in parts):
        warnings.warn(
            "PEFT's LoRA on nn.MultiheadAttention adds its update to the weights and subtracts it again in every "
            "forward, which changes their last bits: prompts work, but a prompt file may not recognize its backbone. "
            'Merge the LoRA before wrap (merge_and_unload()), or load with check_backbone="warn".',
            UserWarning,
            stacklevel=2,
        )
