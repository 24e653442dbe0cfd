"""Sections of pictures: headings, captions, and texts for readers who do not see the pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lpt_peft.metrics.shot_rules import SHOT_NAMES
from lpt_peft.report.classes import clip, percent, with_interval

SECTIONS = (
    ("prompts", "What the prompts changed", ("features", "projection", "pretraining")),
    ("groups", "Groups", ("matching", "pool")),
    ("calibration", "Calibration", ("calibration",)),
    ("shift", "Shifted images", ("shift",)),
    ("curves", "Training", ("curves",)),
)
"""Id, heading and pictures of each section, in order."""

_CAPTIONS = {
    "classes": "Each point is a class, from most to fewest training images. The lower bars are the training images.",
    "confused_pairs": "The pairs of classes that are confused most often; colours are those of the true class above.",
    "features": "Nearest training images under the cosine of the features, without the classifier, and gamma: the mean "
    "distance within classes over that between classes.",
    "projection": "Test images in the plane that best separates the training images of some classes.",
    "pretraining": "Images like those of the pretraining and test images, on the line that separates them.",
    "matching": "Upper: how often each group is selected. Lower: which groups the images of a class select.",
    "pool": "The same classifier with other groups than the selected ones.",
    "calibration": "A curve below the diagonal is overconfident. Larger points stand for more images.",
    "shift": "Accuracy on the classes that both sets have.",
    "curves": "A dashed line separates the phases.",
}


def describe(name: str, analysis: Mapping[str, Any]) -> tuple[str, str]:
    """Alternative text and caption of a picture.

    Args:
        name: Of the picture, as in `lpt_peft.analysis.plots.figures`, or "curves".
        analysis: See `lpt_peft.recipe.analyse.analyse`.
    """
    return _ALT[name](analysis), _CAPTIONS[name]


def _classes(analysis: Mapping[str, Any]) -> str:
    means = ", ".join(f"{shot}-shot {with_interval(analysis['accuracy'][shot])}" for shot in SHOT_NAMES)
    return f"Accuracy of {len(analysis['classes']['name']):,} classes above their training images. Means: {means}."


def _pairs(analysis: Mapping[str, Any]) -> str:
    names = analysis["classes"]["name"]
    pairs = ", ".join(
        f"{clip(names[pair['target']])} as {clip(names[pair['prediction']])} ({pair['images']:,} images)"
        for pair in analysis["confused_pairs"][:5]
    )
    return f"Bars of the most confused pairs of classes: {pairs}."


def _features(analysis: Mapping[str, Any]) -> str:
    rows = []
    for state, row in analysis["features"].items():
        nearest = (row.get("knn_1") or {}).get("balanced_accuracy")
        gamma = "–" if row["gamma"] is None else f"{row['gamma']:.3f}"
        rows.append(f"{state}: 1-NN accuracy {percent(nearest)}, gamma {gamma}")
    return f"Bars of k-NN accuracy and gamma. {'; '.join(rows)}."


def _matching(analysis: Mapping[str, Any]) -> str:
    matching = analysis["matching"]
    return (
        f"Heat map of classes and {len(matching['usage'])} groups, {len(matching['unused'])} of them unused; mutual "
        f"information {matching['mutual_information']:.2f} bits."
    )


def _pool(analysis: Mapping[str, Any]) -> str:
    rows = analysis["pool"]["rows"]
    values = ", ".join(f"{name} {percent(row['balanced_accuracy'])}" for name, row in rows.items())
    return f"Bars of balanced accuracy by the choice of groups: {values}."


def _calibration(analysis: Mapping[str, Any]) -> str:
    gaps = [f"{shot} {percent(row['error'])}" for shot, row in analysis["calibration"]["before"].items()]
    return f"Reliability curves. Mean gaps: {', '.join(gaps)}."


def _shift(analysis: Mapping[str, Any]) -> str:
    rows = (f"{clip(r['name'])} {percent(r['original'])} to {percent(r['shifted'])}" for r in analysis["shift"])
    return f"Accuracy on original and shifted images: {', '.join(rows)}."


_ALT: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "classes": _classes,
    "confused_pairs": _pairs,
    "features": _features,
    "projection": lambda _: "Scatter plots of test images in the plane of two linear discriminants, for each state.",
    "pretraining": lambda _: (
        "Scatter plots of images like those of the pretraining and of test images, for each state."
    ),
    "matching": _matching,
    "pool": _pool,
    "calibration": _calibration,
    "shift": _shift,
    "curves": lambda _: "Training loss and validation accuracy by epoch.",
}
