"""What must stand still in a wrapped ViT, parameters and batch-norm statistics, and how it was before.

Not here: how blocks take prompts (`lpt_peft.prompting`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class FrozenState:
    """Remembers what of a ViT was trainable and which batch norms were in train mode, for the way back.

    Args:
        model: As it is before it is frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._was_trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._norm_modes: dict[str, bool] = {}

    def freeze(self, model: nn.Module) -> None:
        """No parameter gets a gradient, and running statistics of batch norms stay as they are."""
        model.requires_grad_(False)
        self.sync_mode(model)

    def sync_mode(self, model: nn.Module) -> None:
        """Take note of the modes that batch norms are in now, and put them in eval mode."""
        self._norm_modes = _batch_norm_modes(model)
        _set_batch_norms(model, dict.fromkeys(self._norm_modes, False))

    def restore(self, model: nn.Module) -> None:
        """As it was before, in the mode set last; where layers were put in since (LoRA), their owner's choice stays."""
        _set_batch_norms(model, self._norm_modes)
        parameters = dict(model.named_parameters())
        if parameters.keys() == self._was_trainable.keys():
            for name, parameter in parameters.items():
                parameter.requires_grad_(self._was_trainable[name])


def _batch_norm_modes(model: nn.Module) -> dict[str, bool]:
    """Whether each batch norm, by name, is in train mode."""
    norms = nn.modules.batchnorm._BatchNorm
    return {name: module.training for name, module in model.named_modules() if isinstance(module, norms)}


def _set_batch_norms(model: nn.Module, modes: Mapping[str, bool]) -> None:
    for name, module in model.named_modules():
        if name in modes:
            module.train(modes[name])
