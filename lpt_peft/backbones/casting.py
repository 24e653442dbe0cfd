"""Casts the frozen weights of a ViT and remembers the fingerprint of the original ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lpt_peft.backbones.base import Backbone
from lpt_peft.backbones.fingerprint import fingerprint
from lpt_peft.errors import ConfigError


class Cast(NamedTuple):
    """How to recognise cast weights, and what they were before."""

    original: str
    """Fingerprint before."""
    fingerprint: str
    """Fingerprint of the cast weights, wherever they are moved."""


def cast_inputs(arguments: Any, vit: nn.Module) -> Any:
    """Cast floating point tensors among the arguments of a forward, however nested, to the frozen weights' dtype."""
    dtype = next(parameter.dtype for parameter in vit.parameters() if not parameter.requires_grad)
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, arguments)


@torch.no_grad()
def cast_frozen(backbone: Backbone, dtype: torch.dtype, original: str) -> Cast:
    """Cast parameters that need no gradient, and buffers, in place.

    Args:
        backbone: Its ViT is changed; parameters that need a gradient, such as LoRA's, keep their dtype.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        original: Fingerprint of the weights before.

    Raises:
        ConfigError: The dtype is another.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype={dtype} must be torch.float32, torch.bfloat16 or torch.float16.")
    for module in backbone.model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))
    return Cast(original, fingerprint(backbone.frozen_tensors()))
