"""swap_prompts: other prompts for a ViT that is wrapped already, all of them or the shared part alone.

Not here: wrapping a ViT (`pretrained.py`) and reading the file (`prompt_file.py`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.checkpoint.pretrained import CheckBackbone, check_match
from lpt_peft.checkpoint.prompt_file import PromptFile
from lpt_peft.errors import BackboneMismatchError, ConfigError, StateError
from lpt_peft.heads import CosineClassifier
from lpt_peft.prompts import PromptPool, SharedPrompt

Part = Literal["all", "shared"]


def swap_prompts(
    adapter: LongTailPromptAdapter,
    prompts: PromptFile,
    *,
    part: Part = "all",
    check_backbone: CheckBackbone = "error",
) -> None:
    """Give a wrapped ViT other prompts; the ViT is not touched, and where anything is wrong nothing changes.

    Args:
        adapter: Its ViT must be the backbone of the prompts.
        prompts: As read; other sizes, classes and dtypes than the adapter's are fine for `part="all"`.
        part: "all" makes the adapter as if it had been loaded from the file: prompts, head, phase, metadata. They are
            new parameters: make a new optimizer. "shared" copies the shared prompts and leaves the rest, phase too.
        check_backbone: As in `load_prompts`.

    Raises:
        BackboneMismatchError: Learnt on another backbone, or its sizes do not fit.
        ConfigError: An option is out of range, or for `part="shared"` the shared prompts have another shape.
        StateError: The adapter was unwrapped.
    """
    if part not in ("all", "shared"):
        raise ConfigError(f'part={part!r} must be "all" or "shared".')
    if getattr(adapter, "vit", None) is None:
        raise StateError("This adapter was unwrapped; call LongTailPromptAdapter.from_pretrained(source, vit).")
    known = adapter.fingerprint if check_backbone != "off" else None
    check_match(prompts, adapter.backbone, check_backbone, known)
    if part == "shared":
        _copy_shared(adapter, prompts.tensors["shared.prompts"])
    else:
        _replace(adapter, prompts)


def _copy_shared(adapter: LongTailPromptAdapter, given: torch.Tensor) -> None:
    own = adapter.get_parameter("shared.prompts")
    if own.shape != given.shape:
        raise ConfigError(
            f"The file's shared prompts are {tuple(given.shape)} (blocks, tokens, width), the adapter's "
            f'{tuple(own.shape)}: they cannot be swapped alone. Load the whole file: part="all".'
        )
    if not bool(given.to(own.dtype).isfinite().all()):
        raise ConfigError(
            f"The file's shared prompts are too large for the adapter's {own.dtype}. Load the whole file, which brings "
            'its own dtype: part="all".'
        )
    with torch.no_grad():
        own.copy_(given)


def _replace(adapter: LongTailPromptAdapter, prompts: PromptFile) -> None:
    config, backbone = prompts.prompt_config, adapter.backbone
    ours = (backbone.dim, len(backbone.blocks), backbone.feature_dim)
    if (config.dim, config.depth, config.feature_dim) != ours:
        raise BackboneMismatchError(
            f"The prompts are for a ViT of width {config.dim}, {config.depth} blocks and feature width "
            f"{config.feature_dim}; this one has {ours[0]}, {ours[1]} and {ours[2]}."
        )
    # Constructors draw initial values; loading must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        learnt: dict[str, nn.Module] = {
            "shared": SharedPrompt(config.depth, config.prompt_length, config.dim),
            "pool": PromptPool.from_config(config),
            "head": CosineClassifier(backbone.feature_dim, config.num_classes, config.logit_scale),
        }
    for name, module in learnt.items():
        reference: nn.Module = getattr(adapter, name)
        module.to(next(reference.parameters()).device).train(reference.training)
    for name, tensor in prompts.tensors.items():
        owner, _, leaf = name.partition(".")
        parameter = learnt[owner].get_parameter(leaf)
        parameter.data = tensor.to(parameter.device, copy=True)
    for name, module in learnt.items():
        setattr(adapter, name, module)
    adapter.prompt_config = config
    adapter.metadata = prompts.metadata
    adapter.phase = prompts.phase
