"""Freezing a wrapped ViT, parameters and batch-norm statistics, and restoring it; the tensors behind its feature."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lpt_peft.backbones.base import Backbone


class FrozenState:
    """Which parameters of a ViT were trainable, and which batch norms were in train mode.

    Args:
        model: The model before it is frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._was_trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._norm_modes: dict[str, bool] = {}

    def freeze(self, model: nn.Module) -> None:
        """Freeze all parameters, set their gradients to None, and put batch norms in eval mode."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None  # clipping would count an old gradient
        self.sync_mode(model)

    def sync_mode(self, model: nn.Module) -> None:
        """Record the current modes of batch norms and put them in eval mode."""
        self._norm_modes = _batch_norm_modes(model)
        _set_batch_norms(model, dict.fromkeys(self._norm_modes, False))

    def restore(self, model: nn.Module) -> None:
        """Restore `requires_grad` and batch-norm modes; skips `requires_grad` if layers were added."""
        _set_batch_norms(model, self._norm_modes)
        parameters = dict(model.named_parameters())
        if parameters.keys() == self._was_trainable.keys():
            for name, parameter in parameters.items():
                parameter.requires_grad_(self._was_trainable[name])


def feature_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """Return the tensors that the feature depends on, as the fingerprint covers them, by name in the model.

    They share memory with the model. Its classifier, and the text tower of a CLIP, are not among them.
    """
    covered = {_place(tensor) for tensor in backbone.frozen_tensors()}
    state = backbone.model.state_dict()
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and _place(tensor) in covered}


def feature_parameters(backbone: Backbone) -> dict[str, nn.Parameter]:
    """Return the parameters among `feature_tensors`, by name in the model."""
    names = feature_tensors(backbone).keys()
    return {name: parameter for name, parameter in backbone.model.named_parameters() if name in names}


def _place(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape


def _batch_norm_modes(model: nn.Module) -> dict[str, bool]:
    """Whether each batch norm, by name, is in train mode."""
    norms = nn.modules.batchnorm._BatchNorm
    return {name: module.training for name, module in model.named_modules() if isinstance(module, norms)}


def _set_batch_norms(model: nn.Module, modes: Mapping[str, bool]) -> None:
    for name, module in model.named_modules():
        if name in modes:
            module.train(modes[name])
