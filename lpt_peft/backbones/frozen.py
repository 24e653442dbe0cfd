"""What else must stand still in a frozen ViT besides its parameters: the running statistics of batch norms."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def batch_norm_modes(model: nn.Module) -> dict[str, bool]:
    """Whether each batch norm of `model`, by name, is in train mode."""
    norms = nn.modules.batchnorm._BatchNorm
    return {name: module.training for name, module in model.named_modules() if isinstance(module, norms)}


def set_batch_norms(model: nn.Module, modes: Mapping[str, bool]) -> None:
    """Put batch norms of `model` in train or eval mode; in eval mode their running statistics stay as they are."""
    for name, module in model.named_modules():
        if name in modes:
            module.train(modes[name])
