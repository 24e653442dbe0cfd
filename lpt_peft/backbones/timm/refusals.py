"""Reasons why a timm model cannot take prompts, with alternatives.

The reason follows from the module that defines the model's class, or from the parts of the model; there is no list of
model names. Not here: models that take prompts (`families.py`).
"""

from __future__ import annotations

from torch import nn

_CONVOLUTION = "it has no attention over tokens, so there are no keys and values to add a prompt to"
_CHANNELS = "its attention is between channels, not between tokens, so no token can attend to a prompt"
_STAGES = "its tokens lie on a grid that has windows or shrinks between stages, and a prompt has no place on it"
_LOCAL = "its attention depends on positions or neighborhoods on a grid, and a prompt has no place on it"
_LATER = "a prompt could enter its attention, but its blocks are not a single chain; this is not supported yet"

_ALTERNATIVES = {
    _CONVOLUTION: '"vit_small_patch16_224" or, with convolutions in front of its blocks, "vit_small_r26_s32_224"',
    _CHANNELS: '"deit3_small_patch16_224"',
    _STAGES: '"vit_base_patch16_224" or, for large images, "vit_base_patch16_dinov3"',
    _LOCAL: '"deit3_small_patch16_224" or, with relative positions, "vit_relpos_small_patch16_224"',
    _LATER: '"deit3_small_patch16_224"',
}

_REASONS = {
    "xcit": _CHANNELS,
    "davit": _CHANNELS,
    "volo": _LOCAL,
    "convit": _LOCAL,
    "resnest": _CONVOLUTION,
    "resnet": _CONVOLUTION,
    "cait": _LATER,
    "pit": _LATER,
    "crossvit": _LATER,
    "tnt": _LATER,
    "vision_transformer_sam": _LATER,
}


def reason(model: nn.Module) -> str:
    """Return why `model` cannot take prompts, as a message."""
    kind, module = type(model).__name__, type(model).__module__
    why = _REASONS.get(module.rpartition(".")[2]) or _by_structure(model)
    return f"timm's {kind} cannot take prompts: {why}. Supported: plain ViTs, for example {_ALTERNATIVES[why]}."


def _by_structure(model: nn.Module) -> str:
    parts = {type(part).__name__.lower() for part in model.modules()}
    if not any("attention" in part or "attn" in part for part in parts):
        return _CONVOLUTION
    return _STAGES
