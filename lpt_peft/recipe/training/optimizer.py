"""The parameter update of a step: learning rates, weight decay, clipping, SGD or AdamW, without a host read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lpt_peft.prompts import decay_selected, selected_groups
from lpt_peft.recipe.rates import learning_rates, rate_scale
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from lpt_peft.recipe.training.divergence import DivergenceFlag
from lpt_peft.recipe.training.schedule import Schedule

_STATE = {  # names of tensors in a checkpoint, and in torch
    "sgd": {"momentum": "momentum_buffer"},
    "adamw": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "optimizer_step": "step"},
}


class PhaseOptimizer:
    """The optimizer of a phase, with its schedule, decay and clipping.

    The learning rate of a step is `learning_rate * schedule(step)` for AdamW. For SGD it is
    `learning_rate * B / 256 * schedule(step)`, where `B = batch_size / 2` are the images of each half of a step.
    `head_learning_rate` and `pool_learning_rate` take its place for the head and for the group prompts.

    `decay="selected"` restricts the weight decay of keys and group prompts to the groups that a step selects: SGD adds
    L2 to their gradients, AdamW shrinks them by their learning rate times `weight_decay`.

    Args:
        trainable: Trained parameters by name; those of the head begin with "head.", those of the pool with "pool.".
        settings: `optimizer`, `batch_size`, `decay` and `clip_norm` are used.
        phase: Settings of the phase.
        schedule: Factor on the peak learning rate of every step.
        accelerator: Its gradient scaler is used, if any.

    Attributes:
        learning_rate: Of the last step, where `head_learning_rate` and `pool_learning_rate` do not apply.
        clipped: Number of clipped steps since it was last set to zero, a scalar on the parameters' device.
    """

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        settings: TrainSettings,
        phase: PhaseSettings,
        schedule: Schedule,
        accelerator: Accelerator,
    ) -> None:
        self.learning_rate = 0.0
        self.clipped = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self._trainable, self._settings, self._phase, self._accelerator = trainable, settings, phase, accelerator
        self._base_rate = learning_rates(phase, settings).base
        self._schedule = schedule
        self._selected = {p for n, p in trainable.items() if settings.decay == "selected" and n.startswith("pool.")}
        self._optimizer = make_optimizer(trainable, settings, phase)

    def update(self, step: int, gradients: Sequence[Tensor], divergence: DivergenceFlag) -> None:
        """Update the parameters and clear their gradients; a diverged run is left unchanged.

        Args:
            step: Number of earlier steps.
            gradients: Gradients of the trained parameters.
            divergence: Flag of this step.
        """
        optimizer, scaler, clip_norm = self._optimizer, self._accelerator.scaler, self._settings.clip_norm
        factor = rate_scale(self._settings) * self._schedule(step)
        self.learning_rate = self._base_rate * factor
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if scaler:
            divergence.invalidate_(gradients)
            scaler.unscale_(optimizer)
        decoupled = []
        if self._settings.optimizer == "adamw":
            decoupled = self._decoupled_decay()
        else:
            for parameter in self._selected:
                decay_selected(parameter, self._phase.weight_decay)
        if clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self._trainable.values(), clip_norm)
            self.clipped += (norm > clip_norm) & (divergence.found_inf == 0)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.found_inf = divergence.found_inf  # type: ignore[attr-defined]
            optimizer.step()
        for parameter, decay, steps in decoupled:
            with torch.no_grad():  # 0 times the decay, if torch skipped the step
                parameter.sub_(decay * (optimizer.state[parameter]["step"] - steps).to(decay.dtype))
        self.clear_gradients()

    def _decoupled_decay(self) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
        """Each pool parameter, the decay of its selected groups, and the number of steps that torch has done."""
        found = []
        for group in self._optimizer.param_groups:
            decay = group["lr"] * self._phase.weight_decay
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in self._selected:
                    values = torch.where(selected_groups(parameter.grad), decay * parameter.detach(), 0.0)
                    found.append((parameter, values, self._optimizer.state[parameter]["step"].clone()))
        return found

    def clear_gradients(self) -> None:
        """Remove all gradients of the trained parameters."""
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors for `load_state`, by kind and parameter name; without momentum, SGD has none."""
        states = {name: self._optimizer.state[parameter] for name, parameter in self._trainable.items()}
        return {
            kind: {name: state[key] for name, state in states.items() if key in state}
            for kind, key in _STATE[self._settings.optimizer].items()
        }

    def load_state(self, kinds: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore the result of `state`; other kinds are ignored."""
        for kind, key in _STATE[self._settings.optimizer].items():
            for name, value in kinds.get(kind, {}).items():
                self._optimizer.state[self._trainable[name]][key] = value


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: TrainSettings, phase: PhaseSettings
) -> torch.optim.Optimizer:
    """Build SGD or AdamW; the caller sets `lr` of each parameter group to a multiple of its `peak` in every step.

    These are torch's fused implementations, on CPUs too: a single kernel for all parameters, which leaves parameters
    and state unchanged if the optimizer's attribute `found_inf`, a scalar tensor, is 1. The state exists from the
    start, at zero: the results are the same, but torch leaves momentum uninitialized if the first step is skipped.

    Args:
        parameters: By name, floating point.
        settings: `method`, `optimizer` and `decay` are used.
        phase: Learning rates, momentum and weight decay.
    """
    rates = learning_rates(phase, settings)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        part = "keys" if name == "pool.keys" else name.partition(".")[0]
        peak = {"head": rates.head, "pool": rates.pool}.get(part, rates.base)
        decay = 0.0 if settings.decay == "selected" and name.startswith("pool.") else phase.weight_decay
        group = groups.setdefault((peak, decay), {"params": [], "lr": 0.0, "peak": peak, "weight_decay": decay})
        group["params"].append(parameter)
    used = list(groups.values())
    if settings.optimizer == "adamw":
        adamw = torch.optim.AdamW(used, betas=(phase.momentum, 0.999), fused=True)
        for parameter in parameters.values():
            adamw.state[parameter].update(
                step=torch.zeros((), device=parameter.device),
                exp_avg=torch.zeros_like(parameter),
                exp_avg_sq=torch.zeros_like(parameter),
            )
        return adamw
    sgd = torch.optim.SGD(used, momentum=phase.momentum, fused=True)
    if phase.momentum:
        for parameter in parameters.values():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd
