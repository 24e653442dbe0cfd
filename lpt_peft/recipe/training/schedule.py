"""The learning-rate curve: linear warm-up per step, then half a cosine to zero."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Factor on the peak learning rate at `step`, 0-based, of `total` steps of which `warmup` rise.

    The first step has `1 / warmup` of the peak, not 0, and the last one is not wasted either.

    Example:
        >>> [round(warmup_cosine(step, 6, 2), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
