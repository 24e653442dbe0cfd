"""What else must stand still in a frozen ViT besides its parameters: the running statistics of batch norms."""

from __future__ import annotations

from torch import nn


def set_batch_norms(model: nn.Module, training: bool) -> None:
    """Put every batch norm of `model` in train or eval mode; in eval mode their running statistics stay as they are."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(training)
