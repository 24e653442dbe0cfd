r"""Class-stratified bootstrap intervals of balanced accuracies, and of paired differences between models.

For class c with test images :math:`i = 1 \dots n_c`, of which a model classifies :math:`x_{ci} \in \{0, 1\}` correctly,
the balanced accuracy is

.. math:: \theta = \frac{1}{|C|} \sum_{c \in C} \frac{1}{n_c} \sum_{i=1}^{n_c} x_{ci}.

The bootstrap (Efron, *Bootstrap methods: another look at the jackknife*, Annals of Statistics 7, 1979) draws
:math:`n_c` images with replacement within each class, so that every draw has the class frequencies of the test set
(stratified: Davison and Hinkley, *Bootstrap Methods and their Application*, 1997, section 3.2). The interval lies
between percentiles of :math:`\theta^*` over the draws.

Of several models, such as the seeds of a row, :math:`x_{ci}` is the mean over the models; of a paired difference, it is
the difference of the two means on the same image. It takes few values :math:`v_k`, so a draw is a multinomial count per
class instead of a list of images: :math:`m^*_c \sim \mathrm{Multinomial}(n_c, m_c / n_c)` and
:math:`\sum_k v_k m^*_{ck} / n_c`, where :math:`m_{ck}` images of class c have the value :math:`v_k`.

The interval measures the choice of test images, for the trained models as they are; the spread over seeds measures
training. For small :math:`n_c` it is too narrow by the factor :math:`\sqrt{(n_c - 1) / n_c}`: by 5 % for 10 images, and
a class with a single image adds no width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpt_peft._numbers import checked_integer, is_finite_number
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.metrics.checks import Counts, as_integers
from lpt_peft.metrics.result import SHOTS
from lpt_peft.metrics.shot_rules import SHOT_RULES, ShotRule, shot_groups

_MANY_CLASSES = 1000
_MAX_BYTES = 2**26  # of the counts in memory at a time


def default_draws(num_classes: int) -> int:
    """Draws of an interval: fewer for thousands of classes, whose draws take minutes and vary little.

    Example:
        >>> default_draws(365), default_draws(8142)
        (10000, 1000)
    """
    return 10_000 if num_classes <= _MANY_CLASSES else 1_000


class Interval(NamedTuple):
    """An estimate and its bootstrap interval."""

    estimate: float
    """Observed value: a fraction from 0 to 1, or a difference from -1 to 1."""
    low: float
    high: float


class _Sample(NamedTuple):
    scores: np.ndarray
    """(N,) sums over models."""
    classes: np.ndarray
    """(N,)"""
    models: int


def bootstrap_accuracy(
    correct: Tensor,
    target: Tensor,
    class_counts: Counts,
    rule: ShotRule = SHOT_RULES["lpt"],
    *,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """Bootstrap intervals of the balanced accuracy and of many-, medium- and few-shot accuracy.

    Args:
        correct: Whether each image was classified correctly, (N,) bool; or (S, N) for S models, whose mean is taken.
        target: True classes, (N,) integers. Or (S, N) if every model has its own images: they are resampled
            independently, and the mean over the models is taken in every draw.
        class_counts: Training images of each class, (C,) integers; they determine many, medium and few.
        rule: The shot thresholds.
        draws: Number of bootstrap draws.
        level: Probability of the interval, above 0 and below 1.
        seed: Of the draws.

    Returns:
        Intervals of "overall", "many", "medium" and "few"; None if no class of the group has an image.

    Raises:
        InputError: Shapes, dtypes or labels do not fit together, or there is no image.
        ConfigError: `draws`, `level` or `seed` is out of range.

    Example:
        >>> target = torch.arange(200) % 2
        >>> correct = (torch.arange(200) % 8) > 1  # three quarters
        >>> interval = bootstrap_accuracy(correct, target, [500, 5])["overall"]
        >>> interval.estimate, 0.68 < interval.low < 0.71, 0.79 < interval.high < 0.82
        (0.75, True, True)
    """
    hits = _hits("correct", correct)
    return _intervals(_samples(hits, target, class_counts), class_counts, rule, draws=draws, level=level, seed=seed)


def bootstrap_difference(
    correct: Tensor,
    baseline: Tensor,
    target: Tensor,
    class_counts: Counts,
    rule: ShotRule = SHOT_RULES["lpt"],
    *,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """Bootstrap intervals of the accuracy of a model minus that of a baseline on the same images.

    The images are resampled in pairs, so images that both models classify alike add nothing to the width.

    Args:
        correct: Whether the model classified each image correctly, (N,) or (S, N) bool.
        baseline: The same of the baseline, of the same shape.
        target: As in `bootstrap_accuracy`, like all following arguments.
        class_counts: Training images of each class, (C,) integers.
        rule: The shot thresholds.
        draws: Number of bootstrap draws.
        level: Probability of the interval, above 0 and below 1.
        seed: Of the draws.

    Returns:
        Intervals of the differences "overall", "many", "medium" and "few"; None if no class of the group has an image.

    Raises:
        InputError: Shapes, dtypes or labels do not fit together, or there is no image.
        ConfigError: `draws`, `level` or `seed` is out of range.
    """
    first, second = _hits("correct", correct), _hits("baseline", baseline)
    if first.shape != second.shape:
        raise InputError(
            f"correct {tuple(first.shape)} and baseline {tuple(second.shape)} must have the same shape: a paired "
            "difference needs the same images and as many models."
        )
    return _intervals(
        _samples(first - second, target, class_counts), class_counts, rule, draws=draws, level=level, seed=seed
    )


def _hits(name: str, correct: Any) -> np.ndarray:
    """Correct predictions (S, N) as int64 0 or 1."""
    if not isinstance(correct, Tensor) or correct.dtype != torch.bool or correct.ndim not in (1, 2):
        found = f"{correct.dtype} {tuple(correct.shape)}" if isinstance(correct, Tensor) else type(correct).__name__
        raise InputError(f"{name} must be bool (N,) or (S, N), not {found}: pass prediction == target.")
    hits: np.ndarray = torch.atleast_2d(correct.detach().cpu()).long().numpy()
    if not hits.size:
        raise InputError(f"{name} is empty: pass the predictions of at least one model on at least one image.")
    return hits


def _samples(scores: np.ndarray, target: Tensor, class_counts: Counts) -> list[_Sample]:
    """Independent samples of images."""
    size = len(class_counts)
    models, images = scores.shape
    shared = getattr(target, "ndim", 1) == 1
    targets = [target] if shared else list(target)
    if not shared and len(targets) != models:
        raise InputError(f"target has {len(targets)} rows and correct {models}: pass a row for each model, or (N,).")
    classes = [as_integers("target", row, size).numpy() for row in targets]
    if len(classes[0]) != images:
        raise InputError(f"target has {len(classes[0])} images and correct {images}: pass those of the same images.")
    if shared:
        return [_Sample(scores.sum(0), classes[0], models)]
    return [_Sample(*pair, 1) for pair in zip(scores, classes, strict=True)]


def _intervals(
    samples: Sequence[_Sample], class_counts: Counts, rule: ShotRule, *, draws: int, level: float, seed: int
) -> dict[str, Interval | None]:
    draws, seed = checked_integer("draws", draws, 1), checked_integer("seed", seed, 0)
    if not is_finite_number(level) or not 0 < level < 1:
        raise ConfigError(f"level={level!r:.80} must be above 0 and below 1, such as 0.95.")
    groups = shot_groups(class_counts, rule).numpy()
    generator = np.random.default_rng(seed)
    observed, resampled = np.zeros(len(SHOTS)), np.zeros((draws, len(SHOTS)))
    for scores, classes, models in samples:
        values, counts = _value_counts(scores, classes, len(groups))
        weights = _weights(groups, counts.sum(1)) / (models * len(samples))
        observed += (counts @ values / counts.sum(1).clip(1)) @ weights
        resampled += _resample(values, counts, weights, draws, generator)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    found = zip(SHOTS, observed.tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: None if np.isnan(estimate) else Interval(estimate, *bounds) for name, estimate, *bounds in found}


def _value_counts(scores: np.ndarray, classes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct scores (V,), and the number of images of each class with each of them (C, V)."""
    values, code = np.unique(scores, return_inverse=True)
    counts = np.bincount(classes * len(values) + code, minlength=size * len(values))
    return values, counts.reshape(size, len(values))


def _weights(groups: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Weights (C, 4) of the classes in the means overall, many, medium and few; NaN columns of means over nothing."""
    members = (
        np.stack([np.ones_like(groups), *(groups == number for number in range(3))], axis=1) * (images > 0)[:, None]
    )
    total = members.sum(0)
    with np.errstate(invalid="ignore"):
        weights: np.ndarray = members / total
    return weights


def _resample(
    values: np.ndarray, counts: np.ndarray, weights: np.ndarray, draws: int, generator: np.random.Generator
) -> np.ndarray:
    """Weighted means (draws, 4) of resampled images; classes with a single value are constant and not drawn."""
    images = counts.sum(1)
    varying = (counts > 0).sum(1) > 1
    constant = ~varying & (images > 0)
    fixed = values[counts[constant].argmax(1)] @ weights[constant]
    result = np.tile(np.where(np.isnan(weights).any(0), np.nan, fixed), (draws, 1))
    if varying.any():
        n, probability = images[varying], counts[varying] / images[varying, None]
        rows = max(1, _MAX_BYTES // (8 * probability.size))
        for start in range(0, draws, rows):
            size = (min(rows, draws - start), len(n))
            drawn = generator.multinomial(n, probability, size=size)  # (rows, classes, V)
            result[start : start + rows] += (drawn @ values / n) @ weights[varying]
    return result
