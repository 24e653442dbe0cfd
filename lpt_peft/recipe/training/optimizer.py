"""The parameter update of a step: learning rate, weight decay, clipping and SGD, without a host read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lpt_peft.prompts import decay_selected
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from lpt_peft.recipe.training.divergence import DivergenceFlag
from lpt_peft.recipe.training.schedule import warmup_cosine


class PhaseOptimizer:
    """SGD with the schedule, decay and clipping of a phase.

    Args:
        trainable: Trained parameters by name.
        settings: `batch_size`, `decay` and `clip_norm` are used.
        phase: Settings of the phase.
        steps: Steps of the phase.
        accelerator: Its gradient scaler is used, if any.

    Attributes:
        learning_rate: Of the last step.
        clipped: Number of clipped steps since it was last set to zero, a scalar on the parameters' device.
    """

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        settings: TrainSettings,
        phase: PhaseSettings,
        steps: int,
        accelerator: Accelerator,
    ) -> None:
        self.learning_rate = 0.0
        self.clipped = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self._trainable, self._settings, self._phase, self._accelerator = trainable, settings, phase, accelerator
        self._steps, self._warmup = steps, warmup_steps(phase, steps)
        self._selected = {n for n in trainable if settings.decay == "selected" and n.startswith("pool.")}
        self._sgd = make_sgd(trainable, phase, without_decay=self._selected)

    def update(self, step: int, gradients: Sequence[Tensor], divergence: DivergenceFlag) -> None:
        """Update the parameters and clear their gradients; a diverged run is left unchanged.

        Args:
            step: Number of earlier steps.
            gradients: Gradients of the trained parameters.
            divergence: Flag of this step.
        """
        scaler, clip_norm = self._accelerator.scaler, self._settings.clip_norm
        factor = self._settings.half_batch / 256 * warmup_cosine(step, self._steps, self._warmup)
        self.learning_rate = self._phase.learning_rate * factor
        for group in self._sgd.param_groups:
            group["lr"] = self.learning_rate
        if scaler:
            divergence.invalidate_(gradients)
            scaler.unscale_(self._sgd)
        for name in self._selected:
            decay_selected(self._trainable[name], self._phase.weight_decay)
        if clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self._trainable.values(), clip_norm)
            self.clipped += (norm > clip_norm) & (divergence.found_inf == 0)
        if scaler:
            scaler.step(self._sgd)
            scaler.update()
        else:
            self._sgd.found_inf = divergence.found_inf  # type: ignore[attr-defined]
            self._sgd.step()
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Remove all gradients of the trained parameters."""
        self._sgd.zero_grad(set_to_none=True)

    def momentum(self) -> dict[str, Tensor]:
        """Momentum by parameter name; empty without momentum."""
        states = {name: self._sgd.state[parameter] for name, parameter in self._trainable.items()}
        return {name: state["momentum_buffer"] for name, state in states.items() if "momentum_buffer" in state}

    def set_momentum(self, values: Mapping[str, Tensor]) -> None:
        """Restore the result of `momentum`."""
        for name, value in values.items():
            self._sgd.state[self._trainable[name]]["momentum_buffer"] = value


def warmup_steps(phase: PhaseSettings, steps: int) -> int:
    """Steps in which the learning rate rises, of all `steps` of a phase."""
    return round(phase.warmup * steps)


def make_sgd(
    parameters: Mapping[str, nn.Parameter], phase: PhaseSettings, *, without_decay: Collection[str] = ()
) -> torch.optim.SGD:
    """Build SGD with the phase's momentum and weight decay; the caller sets the learning rate in each step.

    This is torch's fused implementation, on CPUs too: a single kernel for all parameters, which leaves parameters and
    momentum unchanged if the optimizer's attribute `found_inf`, a scalar tensor, is 1. Momentum starts at zero instead
    of the first gradient: the result is the same, but torch leaves it uninitialized if the first step is skipped.

    Args:
        parameters: By name, floating point.
        phase: Momentum and weight decay.
        without_decay: Names of parameters without weight decay.
    """
    groups = [
        {"params": [p for n, p in parameters.items() if n not in without_decay], "weight_decay": phase.weight_decay},
        {"params": [p for n, p in parameters.items() if n in without_decay], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=phase.momentum, fused=True)
    if phase.momentum:
        for parameter in parameters.values():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
