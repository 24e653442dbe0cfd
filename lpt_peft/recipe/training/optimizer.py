"""The optimizer of a phase: SGD that can skip a step on the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from lpt_peft.recipe.settings import PhaseSettings


def make_sgd(
    parameters: Mapping[str, nn.Parameter], phase: PhaseSettings, *, without_decay: Collection[str] = ()
) -> torch.optim.SGD:
    """SGD with the phase's momentum and weight decay, and a learning rate of 0 that the caller sets in each step.

    It is torch's fused implementation, on a CPU as well: one kernel for all parameters, which leaves parameters and
    momentum as they are where the attribute `found_inf` of the optimizer, a scalar tensor, is 1. Momentum starts at
    zeros, not at the first gradient: the same numbers, but torch leaves it uninitialised if the first step is skipped.

    Args:
        parameters: By name, floating point.
        phase: Momentum and weight decay.
        without_decay: Names of parameters that have no weight decay here.
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
