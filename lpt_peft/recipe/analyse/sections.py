"""Sections of an analysis: statistics of measured tensors as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lpt_peft.analysis import (
    accuracy_of,
    bootstrap_accuracy,
    bootstrap_difference,
    confused_pairs,
    group_histogram,
    knn_predict,
    linear_discriminant,
    matching_statistics,
    pool_value,
    reliability_by_shots,
    separability,
    two_sets,
    weak_classes,
)
from lpt_peft.analysis.bootstrap import default_draws
from lpt_peft.metrics.result import counts_by_class
from lpt_peft.metrics.shot_rules import SHOT_NAMES, SHOT_RULES, shot_groups
from lpt_peft.recipe.analyse.probe import Measured
from lpt_peft.recipe.analyse.subsets import stratified_indices

_LEVEL, _WORST = 0.95, 0.05
_MOST_PAIRS, _MOST_CLASSES, _MOST_POINTS = 50, 10, 1500
_DIGITS = 6


def plain(value: Any) -> Any:
    """Convert tensors, named tuples and numbers to strict JSON: NaN becomes None, fractions have 6 digits."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def prediction_sections(
    measured: Measured,
    class_names: Sequence[str],
    class_counts: Sequence[int],
    shot_rule: str,
    temperature: tuple[float, str] | None = None,
) -> dict[str, Any]:
    """The sections that need predictions alone."""
    size = len(class_names)
    return {
        "classes": classes_section(measured, class_names, class_counts, shot_rule),
        "accuracy": accuracy_section(measured, class_counts, shot_rule),
        "weak": weak_section(measured, size),
        "confused_pairs": pairs_section(measured, size),
        "calibration": calibration_section(measured, class_counts, shot_rule, temperature),
    }


def classes_section(
    measured: Measured, class_names: Sequence[str], class_counts: Sequence[int], shot_rule: str
) -> dict[str, Any]:
    """Accuracy of every class, and the class that it is most confused with."""
    size = len(class_names)
    correct, total = counts_by_class(measured.target, measured.prediction, size)
    pairs = confused_pairs(measured.target, measured.prediction, size)
    confused: dict[int, tuple[int, int]] = {}
    for target, prediction, images in zip(*(column.tolist() for column in pairs[:3]), strict=True):
        confused.setdefault(target, (prediction, images))
    groups = shot_groups(class_counts, SHOT_RULES[shot_rule]).tolist()
    return {
        "name": list(class_names),
        "train_images": list(class_counts),
        "shots": [SHOT_NAMES[group] for group in groups],
        "images": total.tolist(),
        "correct": correct.tolist(),
        "accuracy": plain(correct.double() / total),
        "confused_with": [confused.get(label, (None, 0))[0] for label in range(size)],
        "confused_images": [confused.get(label, (None, 0))[1] for label in range(size)],
    }


def accuracy_section(measured: Measured, class_counts: Sequence[int], shot_rule: str) -> dict[str, Any]:
    """Balanced accuracies with bootstrap intervals."""
    draws = default_draws(len(class_counts))
    intervals = bootstrap_accuracy(
        measured.prediction == measured.target,
        measured.target,
        class_counts,
        SHOT_RULES[shot_rule],
        draws=draws,
        level=_LEVEL,
    )
    return {"level": _LEVEL, "draws": draws, **plain(intervals)}


def weak_section(measured: Measured, size: int) -> dict[str, Any]:
    """Classes that are never right, and the worst 5 % of classes."""
    counts = counts_by_class(measured.target, measured.prediction, size)
    return {"share": _WORST, **plain(weak_classes(*counts, share=_WORST))}


def pairs_section(measured: Measured, size: int) -> list[dict[str, Any]]:
    """The most confused pairs of classes."""
    pairs = plain(confused_pairs(measured.target, measured.prediction, size, limit=_MOST_PAIRS))
    return [dict(zip(pairs, row, strict=True)) for row in zip(*pairs.values(), strict=True)]


def features_section(test: Measured, train: Measured | None, size: int) -> dict[str, Any]:
    """k-NN accuracy, distances and gamma of each state."""
    section = {}
    for state, features in test.features.items():
        row: dict[str, Any] = {}
        if train is not None:
            found = knn_predict(
                train.features[state], train.target, features, k=sorted({1, min(20, len(train.target))})
            )
            named = {"knn_1": found[1], "knn_20": found[max(found)]}
            for name, predicted in named.items():
                row[name] = plain(accuracy_of(predicted, test.target, size)._asdict())
                del row[name]["per_class"]
        distances = separability(features, test.target, size)
        section[state] = row | plain({name: getattr(distances, name) for name in ("intra", "inter", "gamma")})
    return section


def projection_section(test: Measured, train: Measured, class_counts: Sequence[int]) -> dict[str, Any] | str:
    """Test images of some classes in the plane of the discriminants of training images; or why there is none."""
    both = sorted(set(train.target.tolist()) & set(test.target.tolist()), key=lambda label: -class_counts[label])
    if len(both) < 3:
        return f"a discriminant plane needs at least 3 classes with training and test images, and there are {len(both)}"
    steps = torch.linspace(0, len(both) - 1, min(_MOST_CLASSES, len(both))).round().long().tolist()
    classes = [both[step] for step in steps]
    chosen = torch.tensor(classes)
    own, shown = torch.isin(train.target, chosen), torch.isin(test.target, chosen).nonzero().flatten()
    shown = shown[stratified_indices(test.target[shown].tolist(), _MOST_POINTS)]
    if len(train.target[own]) <= len(classes) or len(shown) < 3 * len(classes):
        return "a discriminant plane needs several training and test images per class: raise --max-images"
    states = {}
    for state, features in test.features.items():
        plane = linear_discriminant(train.features[state][own], train.target[own])
        states[state] = plain(
            {
                "points": plane.project(features[shown]),
                "label": test.target[shown],
                "shrinkage": plane.shrinkage,
                "ratio": plane.ratio,
            }
        )
    return {"classes": classes, "states": states}


def pretraining_section(pretraining: Measured, test: Measured, source: str) -> dict[str, Any]:
    """Images like those of the pretraining and test images, on the axis that separates them."""
    states = {}
    for state, features in test.features.items():
        result = two_sets(pretraining.features[state], features)
        row = result._asdict()
        for name in ("first", "second"):
            points = row[name]
            row[name] = points[:: -(-len(points) // _MOST_POINTS)]
        states[state] = plain(row)
    return {"source": source, "images": len(pretraining.target), "states": states}


def matching_section(measured: Measured, size: int, groups: int) -> dict[str, Any]:
    """Groups that the images of each class select."""
    histogram = group_histogram(measured.groups, measured.target, size, groups)
    return {"histogram": histogram.tolist(), **plain(matching_statistics(histogram))}


def pool_section(measured: Measured, class_counts: Sequence[int], groups: int) -> dict[str, Any]:
    """Accuracy with chosen, random, averaged, no and fixed groups."""
    named = {"chosen": measured.prediction}
    named |= {name: measured.variants[name] for name in ("random", "averaged", "none")}
    fixed = torch.stack([measured.variants[f"group {group}"] for group in range(groups)])
    value = pool_value(named, measured.target, len(class_counts), fixed=fixed)
    differences: dict[str, Any] = {}
    others = {name: named[name] for name in ("random", "averaged", "none")} | {"fixed": fixed[value.fixed_group]}
    for name, predicted in others.items():
        intervals = bootstrap_difference(
            measured.prediction == measured.target,
            predicted == measured.target,
            measured.target,
            class_counts,
            draws=default_draws(len(class_counts)),
            level=_LEVEL,
        )
        differences[name] = plain(intervals["overall"])
    rows = {
        name: plain({"accuracy": row.accuracy, "balanced_accuracy": row.balanced_accuracy})
        for name, row in value.rows.items()
    }
    return {
        "rows": rows,
        "chosen_minus": differences,
        "fixed_group": value.fixed_group,
        "oracle_groups": plain(value.oracle_groups),
    }


def calibration_section(
    measured: Measured, class_counts: Sequence[int], shot_rule: str, temperature: tuple[float, str] | None
) -> dict[str, Any]:
    """Calibration by shot group, before and after the temperature, if its value and source are given."""
    correct, rule = measured.prediction == measured.target, SHOT_RULES[shot_rule]
    before = reliability_by_shots(measured.probability, correct, measured.target, class_counts, rule)
    if temperature is None or measured.calibrated is None or measured.losses is None:
        return {"temperature": None, "before": plain(before), "after": None}
    after = reliability_by_shots(measured.calibrated, correct, measured.target, class_counts, rule)
    (value, source), losses = temperature, measured.losses.double().mean(0).tolist()
    record = {"value": value, "loss_before": losses[0], "loss_after": losses[1]}
    return {"temperature": {"source": source, **plain(record)}, "before": plain(before), "after": plain(after)}
