"""SGD that can skip a step on the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from lpt_peft.recipe.settings import PhaseSettings


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
