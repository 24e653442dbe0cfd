"""Pictures of accuracy along the long tail, and of confused classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lpt_peft.analysis.plots.style import BLACK, SHOTS, annotate_bars, legend, new_figure, numbers, short, tidy

_SMOOTHED = 50  # classes above which a moving mean is drawn
_PAIRS = 15
_COLUMNS = ("name", "train_images", "accuracy", "low", "high")


def plot_classes(analysis: Mapping[str, Any]) -> Any:
    """Accuracy of each class, above the number of its training images; classes from frequent to rare.

    Args:
        analysis: With the section "classes"; see `lpt_peft.recipe.analyse.analyse`. Up to 50 classes have intervals, if
            the section has the columns "low" and "high".
    """
    classes = analysis["classes"]
    counts = np.array(classes["train_images"])
    order = np.argsort(-counts, kind="stable")
    accuracy = 100 * numbers(classes["accuracy"])[order]
    shots = np.array(classes["shots"])[order]
    figure = new_figure(5.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    place = np.arange(len(order))
    size = 40 if len(order) <= _SMOOTHED else 12 if len(order) <= 1000 else 3
    for shot, colour in SHOTS.items():
        own = shots == shot
        if own.any():
            mean = accuracy[own & ~np.isnan(accuracy)]
            label = f"{shot}: {mean.mean():.1f} %" if len(mean) else f"{shot}: no test images"
            upper.scatter(place[own], accuracy[own], s=size, color=colour, label=label, alpha=0.85, linewidths=0)
        lower.bar(place[own], np.maximum(counts[order][own], 0.5), width=1.0, color=colour, linewidth=0)
    if len(order) <= _SMOOTHED and "low" in classes:
        low, high = (100 * numbers(classes[name])[order] for name in ("low", "high"))
        colours = [SHOTS[shot] for shot in shots]
        upper.vlines(place, low, high, color=colours, linewidth=1.2, alpha=0.6, label="95 % interval")
    if len(order) > _SMOOTHED:
        upper.plot(place, _moving_mean(accuracy), color=BLACK, linewidth=1.8, label="mean of neighbouring classes")
    upper.set_ylim(-3, 103)
    tidy(upper, title=f"Accuracy of the {len(order):,} classes, frequent to rare", y="accuracy in %")
    handles, texts = upper.get_legend_handles_labels()
    scale = 1.0 if size > 3 else 3.0
    figure.legend(handles, texts, loc="outside lower center", ncols=4, fontsize=10, frameon=False, markerscale=scale)
    lower.set_yscale("log")
    lower.set_ylim(bottom=0.5)
    if len(order) <= 20:
        names = [short(classes["name"][label], 12) for label in order]
        lower.set_xticks(place, names, rotation=45 if max(map(len, names)) > 3 else 0, ha="center")
    tidy(lower, title="", x="class", y="training images")
    return figure


def plot_class_rows(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Accuracy of each class of a run; see `plot_classes`.

    Args:
        rows: `classes` of a split in `results.json`; see `lpt_peft.recipe.class_report`.
    """
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in _COLUMNS}
    return plot_classes({"classes": {**columns, "shots": [row["shot"] for row in rows]}})


def plot_confusion(analysis: Mapping[str, Any]) -> Any:
    """The most confused pairs of classes.

    Args:
        analysis: With the sections "confused_pairs", which must not be empty, and "classes".
    """
    names, pairs = analysis["classes"]["name"], analysis["confused_pairs"][:_PAIRS]
    figure = new_figure(1.0 + 0.34 * len(pairs))
    axes = figure.subplots()
    labels = [f"{short(names[pair['target']])} → {short(names[pair['prediction']])}" for pair in pairs]
    shots = [analysis["classes"]["shots"][pair["target"]] for pair in pairs]
    bars = axes.barh(range(len(pairs)), [pair["images"] for pair in pairs], color=[SHOTS[shot] for shot in shots])
    annotate_bars(axes, bars, [f"{100 * pair['share']:.0f} % of the class" for pair in pairs])
    axes.set_yticks(range(len(pairs)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    tidy(axes, title="Most confused: true class → predicted class", x="images")
    axes.grid(visible=False, axis="y")
    for shot, colour in SHOTS.items():
        if shot in shots:
            axes.barh([0], [0], color=colour, label=f"{shot}-shot true class")
    legend(axes, loc="lower right")
    return figure


def _moving_mean(values: np.ndarray) -> np.ndarray:
    """Mean of about 5 % of the classes around each class, without the classes that have no accuracy."""
    width = max(3, len(values) // 20) | 1
    kernel, known = np.ones(width), ~np.isnan(values)
    totals = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    counts = np.convolve(known.astype(float), kernel, mode="same")
    means: np.ndarray = np.divide(totals, counts, out=np.full(len(values), np.nan), where=counts > 0)
    return means
