"""Calibration error, reliability curve and temperature scaling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpt_peft._numerics import at_least_float32
from lpt_peft.analysis._inputs import check_labels, check_rows, chunks
from lpt_peft.errors import InputError
from lpt_peft.metrics.accumulator import BINS, UNIT, calibration_counters
from lpt_peft.metrics.checks import Counts, first_true
from lpt_peft.metrics.shot_rules import SHOT_NAMES, SHOT_RULES, ShotRule, shot_groups

_BOUNDS = (0.01, 100.0)
_STEPS = 100


class Reliability(NamedTuple):
    """Confidence and accuracy in 15 equal-width bins (i / 15, (i + 1) / 15] of the confidence."""

    error: float | None
    """Expected calibration error; None without images."""
    images: Tensor
    """(15,) int64: images of each bin."""
    accuracy: Tensor
    """(15,) float64: their accuracy; NaN for an empty bin."""
    confidence: Tensor
    """(15,) float64: their mean confidence; NaN for an empty bin."""


class Temperature(NamedTuple):
    """Result of temperature scaling; the losses are mean negative log-likelihoods, in nats."""

    value: float
    """Divide logits by it: above 1 the model is too confident, below 1 not confident enough."""
    loss_before: float
    """With temperature 1."""
    loss_after: float
    """With `value`."""


def reliability(confidence: Tensor, correct: Tensor | Sequence[bool]) -> Reliability:
    r"""Expected calibration error and reliability curve.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{N} \, | \mathrm{accuracy}_b - \mathrm{confidence}_b |

    Source: Guo et al., ICML 2017, arXiv 1706.04599. This is `expected_calibration_error` of
    :py:class:`~lpt_peft.metrics.ShotMetrics`, and torchmetrics' with `n_bins=15, norm="l1"`, which assigns a confidence
    that is exactly a bound of two bins to the other bin.

    Args:
        confidence: Probability of the predicted class (N,), floating point from 0 to 1.
        correct: Whether the prediction is correct (N,), booleans.

    Raises:
        InputError: A shape or dtype is wrong, or a confidence is not from 0 to 1.

    Example:
        >>> round(reliability(torch.tensor([0.9, 0.9, 0.6]), [True, False, True]).error, 4)
        0.4
    """
    right = torch.as_tensor(correct)
    if not isinstance(confidence, Tensor) or not confidence.is_floating_point() or confidence.ndim != 1:
        raise InputError("confidence must be floating point (N,): pass logits.softmax(1).amax(1).")
    if right.dtype != torch.bool or right.shape != confidence.shape:
        raise InputError(
            f"correct must be booleans of shape {tuple(confidence.shape)}, not {right.dtype} of shape "
            f"{tuple(right.shape)}: pass prediction == target."
        )
    values = at_least_float32(confidence).cpu()
    outside = ~((values >= 0) & (values <= 1))
    if bool(outside.any()):
        index = first_true(outside)
        raise InputError(f"confidence[{index}]={values[index]:g} is not from 0 to 1: pass logits.softmax(1).amax(1).")
    images, hits, units = calibration_counters(values, right.cpu()).view(3, BINS)
    confidences = units.double() / UNIT
    error = float((hits - confidences).abs().sum() / len(values)) if len(values) else None
    return Reliability(error, images, hits.double() / images, confidences / images)


def reliability_by_shots(
    confidence: Tensor,
    correct: Tensor,
    target: Any,
    class_counts: Counts,
    rule: ShotRule = SHOT_RULES["lpt"],
) -> dict[str, Reliability]:
    """Compute `reliability` of all images ("overall") and of those of "many", "medium" and "few" shot classes.

    Args:
        confidence: Probability of the predicted class (N,), floating point from 0 to 1.
        correct: Whether the prediction is correct (N,), bool.
        target: True classes (N,), integers.
        class_counts: Training images of each class (C,).
        rule: The shot thresholds.

    Raises:
        InputError: As `reliability`, or a class is out of range.
    """
    found = {"overall": reliability(confidence, correct)}
    groups = shot_groups(class_counts, rule)
    shots = groups[check_labels("target", target, len(confidence), len(groups))]
    values, right = confidence.cpu(), torch.as_tensor(correct).cpu()
    for group, name in enumerate(SHOT_NAMES):
        found[name] = reliability(values[shots == group], right[shots == group])
    return found


@torch.no_grad()
def fit_temperature(logits: Tensor, target: Any) -> Temperature:
    r"""Find the temperature that maximizes the likelihood of the true classes.

    .. math:: \min_T \; -\frac{1}{N} \sum_i \log \mathrm{softmax}(z_i / T)_{y_i}

    Source: Guo et al., ICML 2017, arXiv 1706.04599. The loss is convex in :math:`\beta = 1 / T`; its derivative
    :math:`\frac{1}{N} \sum_i (\mathrm{E}_p[z_i] - z_{i y_i})` increases with :math:`\beta`, and its zero is found by
    Newton steps, bisected where they leave the bracket. Predicted classes do not change. Fit on images that were not
    trained on.

    Args:
        logits: (N, C) floating point and finite, on any device.
        target: True classes (N,), integers from 0 to C - 1.

    Returns:
        The temperature, from 0.01 to 100.

    Raises:
        InputError: A shape is wrong, a value is not finite, all logits of each image are equal, or the likelihood has
            no maximum in the bounds: the images are all classified correctly with ease, or not better than by chance.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
        >>> round(fit_temperature(logits, [0, 0, 0, 1]).value, 2)  # three of four are correct: log(3) = 4 / T
        3.64
    """
    check_rows("logits", logits)
    classes = check_labels("target", target, len(logits), logits.shape[1])
    if bool((logits.amax(1) == logits.amin(1)).all()):
        raise InputError("The logits of each image are all equal, so no temperature changes them: pass other logits.")
    low, high = 1 / _BOUNDS[1], 1 / _BOUNDS[0]
    hint = f"so no temperature from {_BOUNDS[0]:g} to {_BOUNDS[1]:g} fits best"
    separate = bool((logits.gather(1, classes[:, None].to(logits.device)).squeeze(1) == logits.amax(1)).all())
    if separate or _derivatives(logits, classes, high)[1] < 0:
        raise InputError(
            f"The {len(logits)} images are classified correctly with such a margin that more confidence is always "
            f"better, {hint}: fit on more or harder images that were not trained on."
        )
    if _derivatives(logits, classes, low)[1] > 0:
        raise InputError(
            f"The logits of the true classes are no higher than the others, {hint}: train the model for longer, or "
            "check that target belongs to these logits."
        )
    beta = 1.0
    before, slope, curvature = _derivatives(logits, classes, beta)
    for _ in range(_STEPS):
        low, high = (low, beta) if slope > 0 else (beta, high)
        step = beta - slope / curvature if curvature > 0 else low
        following = step if low < step < high else (low * high) ** 0.5
        done = abs(following - beta) <= 1e-10 * beta
        beta = following
        loss, slope, curvature = _derivatives(logits, classes, beta)
        if done:
            break
    return Temperature(1 / beta, before, loss)


def _derivatives(logits: Tensor, classes: Tensor, beta: float) -> tuple[float, float, float]:
    """Loss with logits times beta, and its first and second derivative by beta."""
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in chunks(len(logits), 40 * logits.shape[1]):
        values = logits[rows].double()
        target = values.gather(1, classes[rows, None].to(values.device)).squeeze(1)
        scaled = beta * values
        p = scaled.softmax(1)
        mean = (p * values).sum(1)
        variance = (p * (values - mean[:, None]).square()).sum(1)
        loss = scaled.logsumexp(1) - beta * target
        sums += torch.stack([loss.sum(), (mean - target).sum(), variance.sum()]).cpu()
    loss, slope, curvature = (sums / len(logits)).tolist()
    return loss, slope, curvature
