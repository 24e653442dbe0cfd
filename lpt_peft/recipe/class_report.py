"""What `results.json` states beyond the shot metrics: a row per class, intervals, and calibration by shot group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lpt_peft.analysis import bootstrap_accuracy, reliability_by_shots, weak_classes, wilson_interval
from lpt_peft.analysis.bootstrap import default_draws
from lpt_peft.metrics import ShotResult
from lpt_peft.metrics.result import counts_by_class
from lpt_peft.metrics.shot_rules import SHOT_NAMES, ShotRule, shot_groups
from lpt_peft.recipe.predictions import Predictions

LEVEL = 0.95


def split_results(
    result: ShotResult,
    predictions: Predictions,
    class_names: Sequence[str],
    class_counts: Sequence[int],
    rule: ShotRule,
) -> dict[str, Any]:
    """The entry of a split in `results.json`: the shot metrics and `class_report`."""
    return {**result.to_dict(), **class_report(predictions, class_names, class_counts, rule)}


def class_report(
    predictions: Predictions, class_names: Sequence[str], class_counts: Sequence[int], rule: ShotRule
) -> dict[str, Any]:
    """Describe the predictions on a split, as plain JSON.

    Args:
        predictions: Of the split.
        class_names: (C,) names, in label order.
        class_counts: (C,) training images of each class.
        rule: The shot thresholds.

    Returns:
        - `classes`: a row for each class: name, train_images, shot, images, correct, accuracy, and low and high of its
          95 % interval (Wilson, 1927); the last three are None without images.
        - `intervals`: the 95 % class-stratified bootstrap intervals [low, high] of the mean accuracies over classes.
        - `calibration_error`: expected calibration error of all images and of each shot group.
        - `never_right`: number of classes with images and no correct prediction.
    """
    size = len(class_names)
    target, correct = predictions.target, predictions.correct
    right, total = counts_by_class(target, predictions.prediction, size)
    low, high = wilson_interval(right, total, level=LEVEL)
    columns = {
        "name": list(class_names),
        "train_images": [int(count) for count in class_counts],
        "shot": [SHOT_NAMES[group] for group in shot_groups(class_counts, rule).tolist()],
        "images": total.tolist(),
        "correct": right.tolist(),
        "accuracy": _values((right / total.double()).tolist()),
        "low": _values(low.tolist()),
        "high": _values(high.tolist()),
    }
    intervals = {}
    if len(target):
        intervals = bootstrap_accuracy(correct, target, class_counts, rule, draws=default_draws(size), level=LEVEL)
    errors = reliability_by_shots(predictions.probability.clamp(max=1), correct, target, class_counts, rule)
    return {
        "classes": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        "intervals": {name: None if found is None else [found.low, found.high] for name, found in intervals.items()},
        "calibration_error": {name: found.error for name, found in errors.items()},
        "never_right": len(weak_classes(right, total).never_right),
    }


def _values(numbers: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(number) else number for number in numbers]
