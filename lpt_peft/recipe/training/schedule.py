"""Learning-rate schedule: linear warm-up per step, then cosine decay to zero."""

from __future__ import annotations

import math
from collections.abc import Callable

from lpt_peft.recipe.settings import PhaseSettings

Schedule = Callable[[int], float]  # from the number of earlier steps to a factor on the peak learning rate


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Factor on the peak learning rate.

    The first step uses `1 / warmup` of the peak rather than 0, and the last step is above 0 as well.

    Args:
        step: From 0 to `total - 1`.
        total: Number of steps.
        warmup: Number of steps in which the rate rises.

    Example:
        >>> [round(warmup_cosine(step, 6, 2), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmup_steps(phase: PhaseSettings, total: int) -> int:
    """Steps in which the learning rate rises, of all `total` steps of a phase."""
    return round(phase.warmup * total)


def phase_schedule(phase: PhaseSettings, total: int) -> Schedule:
    """Build the schedule of a phase of `total` steps; see `warmup_cosine`."""
    return lambda step: warmup_cosine(step, total, warmup_steps(phase, total))
