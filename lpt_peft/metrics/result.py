"""Metrics computed from per-class counters."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lpt_peft.errors import ConfigError, InputError
from lpt_peft.metrics.checks import Counts, as_integers, first_true
from lpt_peft.metrics.shot_rules import SHOT_NAMES, SHOT_RULES, ShotRule, shot_groups

Average = Literal["class", "image"]

SHOTS = ("overall", *SHOT_NAMES)
"""Names of the accuracies that summarize a `ShotResult`."""


@dataclass(frozen=True, kw_only=True)
class ShotResult:
    """Test-set metrics; None if nothing can be averaged.

    Attributes:
        rule: Description of the shot rule and of the average.
        num_images: Number of test images.
        overall: `balanced_accuracy` or `accuracy`, depending on `average`.
        many: Accuracy on the many-shot classes, averaged like `overall`.
        medium: Accuracy on the medium-shot classes, averaged like `overall`.
        few: Accuracy on the few-shot classes, averaged like `overall`.
        accuracy: Mean over images: top-1 accuracy.
        balanced_accuracy: Mean over classes of the per-class accuracies.
        geometric_mean: Geometric mean of the per-class accuracies; 0 if any of them is 0.
        harmonic_mean: Harmonic mean of the per-class accuracies; 0 if any of them is 0.
        worst_class: Class with the lowest accuracy; the lowest index if several are equal.
        worst_accuracy: Accuracy of the worst class.
        expected_calibration_error: |accuracy - confidence| of a bin, averaged over images (Guo et al., ICML 2017).
            Confidence is the largest softmax probability, in 15 bins (a, b]. None if some images came without logits.
        absent_classes: Classes without test images.
        per_class: Accuracy of each class; None for absent classes.
    """

    rule: str
    num_images: int
    overall: float | None
    many: float | None
    medium: float | None
    few: float | None
    accuracy: float | None
    balanced_accuracy: float | None
    geometric_mean: float | None
    harmonic_mean: float | None
    worst_class: int | None
    worst_accuracy: float | None
    expected_calibration_error: float | None
    absent_classes: tuple[int, ...]
    per_class: tuple[float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary for strict JSON: `json.dumps(result.to_dict(), allow_nan=False)`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def counts_by_class(target: Tensor, prediction: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Count the correct images and all images of each class, (C,) int64 each: the first arguments of `shot_metrics`.

    Args:
        target: True classes (N,) int64.
        prediction: Predicted classes (N,) int64.
        num_classes: Number of classes C.
    """
    correct = torch.bincount(target[prediction == target], minlength=num_classes)
    return correct, torch.bincount(target, minlength=num_classes)


def shot_metrics(
    correct: Counts,
    total: Counts,
    class_counts: Counts,
    rule: ShotRule = SHOT_RULES["lpt"],
    average: Average = "class",
) -> ShotResult:
    """Compute the metrics that follow from per-class counters. The calibration error does not and is None.

    Args:
        correct: Correctly classified test images of each class, (C,) integers.
        total: Test images of each class, (C,) integers.
        class_counts: Training images of each class, (C,) integers of at least 0; or a mapping from label to count.
        rule: The shot thresholds.
        average: "class" or "image": whether `overall`, `many`, `medium` and `few` weight classes or images equally.

    Raises:
        InputError: Counters are negative, not integers, of different lengths, or `correct` exceeds `total`.
        ConfigError: `average` is unknown.

    Example:
        >>> result = shot_metrics(correct=[9, 3, 0], total=[10, 4, 0], class_counts=[500, 50, 5])
        >>> result.many, result.medium, result.few, result.absent_classes
        (0.9, 0.75, None, (2,))
        >>> result.rule
        'many: n > 100, medium: 20 < n <= 100, few: n <= 20; mean over classes'
    """
    check_average(average)
    correct, total = as_integers("correct", correct), as_integers("total", total)
    groups = shot_groups(class_counts, rule)
    if not len(correct) == len(total) == len(groups):
        raise InputError(
            f"correct, total and class_counts must have one entry per class, not {len(correct)}, {len(total)} and "
            f"{len(groups)}: count with torch.bincount(labels, minlength=num_classes)."
        )
    if (correct > total).any():
        raise InputError(f"correct exceeds total for class {first_true(correct > total)}. Pass correct before total.")

    present = total > 0
    rates = correct.double() / total  # NaN for absent classes, which the means exclude

    def mean(classes: Tensor, by: Average) -> float | None:
        classes = classes & present
        if not classes.any():
            return None
        if by == "class":
            return float(rates[classes].mean())
        return int(correct[classes].sum()) / int(total[classes].sum())

    present_rates = rates[present]
    worst = first_true(rates == present_rates.min()) if len(present_rates) else None
    return ShotResult(
        rule=f"{rule}; mean over {'classes' if average == 'class' else 'images'}",
        num_images=int(total.sum()),
        overall=mean(present, average),
        many=mean(groups == 0, average),
        medium=mean(groups == 1, average),
        few=mean(groups == 2, average),
        accuracy=mean(present, "image"),
        balanced_accuracy=mean(present, "class"),
        geometric_mean=float(present_rates.log().mean().exp()) if len(present_rates) else None,
        harmonic_mean=float(1 / (1 / present_rates).mean()) if len(present_rates) else None,
        worst_class=worst,
        worst_accuracy=None if worst is None else float(rates[worst]),
        expected_calibration_error=None,
        absent_classes=tuple((~present).nonzero().flatten().tolist()),
        per_class=tuple(None if math.isnan(rate) else rate for rate in rates.tolist()),
    )


def check_average(average: str) -> None:
    """Check that `average` is "class" or "image"."""
    if average not in get_args(Average):
        raise ConfigError(
            f"average={average!r} is unknown: pass 'class' (mean over classes) or 'image' (mean over images)."
        )
