"""Wilson's interval of a proportion, such as the accuracy of a class with few test images."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from lpt_peft._numbers import is_finite_number
from lpt_peft.analysis._inputs import check_correct
from lpt_peft.errors import ConfigError


def wilson_interval(correct: Any, total: Any, *, level: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Bounds of the accuracy of each class.

    With :math:`p = x / n` and the normal quantile :math:`z` of the level,

    .. math:: \frac{p + z^2 / 2n \pm z \sqrt{p (1 - p) / n + z^2 / 4n^2}}{1 + z^2 / n}.

    Source: Wilson, *Probable inference, the law of succession, and statistical inference*, Journal of the American
    Statistical Association 22, 1927. Unlike a bootstrap, it has a width for a class that is always or never right.

    Args:
        correct: Correctly classified images of each class (C,), integers.
        total: Images of each class (C,), integers.
        level: Probability of the interval, above 0 and below 1.

    Returns:
        Lower and upper bounds (C,) float64, from 0 to 1; NaN for a class without images.

    Raises:
        InputError: The counts are invalid.
        ConfigError: `level` is out of range.

    Example:
        >>> low, high = wilson_interval([9, 0], [10, 10])
        >>> [round(float(bound), 3) for bound in (low[0], high[0], low[1], high[1])]
        [0.596, 0.982, 0.0, 0.278]
    """
    if not is_finite_number(level) or not 0 < level < 1:
        raise ConfigError(f"level={level!r:.80} must be above 0 and below 1, such as 0.95.")
    right, images = check_correct(correct, total)
    z = NormalDist().inv_cdf((1 + level) / 2)
    n = images.double()
    p = right / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)).sqrt() / (1 + z**2 / n)
    # Rounding must not move the bound of a class that is always or never right past it.
    low = torch.where(right == 0, 0.0, centre - half)
    high = torch.where(right == images, 1.0, centre + half)
    return torch.where(images > 0, low, torch.nan), torch.where(images > 0, high, torch.nan)
