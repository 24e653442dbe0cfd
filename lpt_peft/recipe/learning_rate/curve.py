"""The losses of a learning-rate range test, and the rate that they suggest.

Not here: the steps (`find.py`) and the picture (`plot.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SHARE = 0.75  # of the drop of the loss, at the suggested rate
_WIDTH = 3.0  # standard deviation of the smoothing, in steps: the rate rises by a factor of 1.5 in the default test
_RECENT = 5  # steps whose mean decides whether the loss has risen


@dataclass(frozen=True)
class LearningRateCurve:
    """Losses of a learning-rate range test.

    Attributes:
        phase: The phase that was tested.
        rates: Tested values of `PhaseSettings.learning_rate`, rising.
        losses: Training loss of the step with each rate.

    Example:
        >>> rates = [10 ** (step / 10) for step in range(-30, 11)]
        >>> losses = [4 / (1 + rate / 0.1) + rate**2 for rate in rates]  # falls around 0.1, rises above 1
        >>> round(LearningRateCurve(phase="shared", rates=rates, losses=losses).suggestion, 1)
        0.2
    """

    phase: str
    rates: Sequence[float]
    losses: Sequence[float]

    @property
    def smoothed(self) -> list[float]:
        """Losses averaged over neighboring steps with Gaussian weights; not delayed, unlike an exponential average."""
        return smooth(self.losses)

    @property
    def suggestion(self) -> float | None:
        """Rate at which the smoothed loss has completed three quarters of its drop, rounded to two digits.

        The drop is that from the mean of the first tenth of the steps, where the rate is too low to change anything, to
        the minimum. Lower rates train slowly. Higher rates are close to the minimum, where the loss is about to rise;
        a whole phase does not tolerate a rate that a few steps do. The steepest point of the curve is close, but on the
        noisy losses of small batches its position is random. None if the loss did not fall by more than its noise.
        """
        smoothed = self.smoothed
        if len(smoothed) < 2 * _RECENT:
            return None
        start, lowest = _start(self.losses), min(smoothed)
        noise = math.sqrt(sum((a - b) ** 2 for a, b in zip(self.losses, smoothed, strict=True)) / len(smoothed))
        if start - lowest <= noise:
            return None
        level = start - _SHARE * (start - lowest)
        step = next(step for step, loss in enumerate(smoothed) if loss <= level)
        return float(f"{self.rates[step]:.2g}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready dictionary."""
        return {
            "phase": self.phase,
            "suggestion": self.suggestion,
            "learning_rate": list(self.rates),
            "loss": list(self.losses),
            "smoothed_loss": self.smoothed,
        }


def smooth(losses: Sequence[float], width: float = _WIDTH) -> list[float]:
    """Weighted means of neighboring values, with weights `exp(-distance^2 / (2 width^2))`.

    Args:
        losses: Values in the order of their steps.
        width: Standard deviation of the weights, in steps, above 0.
    """
    reach = math.ceil(3 * width)
    smoothed = []
    for step in range(len(losses)):
        near = range(max(0, step - reach), min(len(losses), step + reach + 1))
        weights = [math.exp(-((other - step) ** 2) / (2 * width**2)) for other in near]
        smoothed.append(sum(w * losses[other] for w, other in zip(weights, near, strict=True)) / sum(weights))
    return smoothed


def has_risen(losses: Sequence[float]) -> bool:
    """Whether the mean of the last steps is half as high again as the start, more than the noise of a batch.

    Args:
        losses: Losses so far.
    """
    if len(losses) < 4 * _RECENT:
        return False
    return sum(losses[-_RECENT:]) / _RECENT > 1.5 * _start(losses)


def _start(losses: Sequence[float]) -> float:
    """Mean of the first tenth, at least five steps."""
    first = losses[: max(_RECENT, len(losses) // 10)]
    return sum(first) / len(first)
