"""Pictures of calibration and of accuracy under domain shift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lpt_peft.analysis.plots.style import BLACK, BLUE, SHOTS, SKY, VERMILION, legend, new_figure, numbers, short, tidy


def plot_calibration(analysis: Mapping[str, Any]) -> Any:
    """Reliability curves by shot group, and of all images before and after the temperature.

    Args:
        analysis: With the section "calibration".
    """
    calibration = analysis["calibration"]
    figure = new_figure(4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes in (left, right):
        axes.plot([0, 100], [0, 100], color="#999999", linewidth=1, linestyle="--")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
    for (shot, colour), marker in zip(SHOTS.items(), "os^", strict=True):
        _curve(left, calibration["before"][shot], shot, colour, marker)
    tidy(left, title="By training images of the class", x="confidence in %", y="accuracy in %")
    _curve(right, calibration["before"]["overall"], "all images", BLACK, "o")
    if calibration["after"] is not None:
        label = f"temperature {calibration['temperature']['value']:.2f}"
        _curve(right, calibration["after"]["overall"], label, BLUE, "s")
    tidy(right, title="All images", x="confidence in %")
    for axes in (left, right):
        legend(axes, loc="upper left", title="mean gap (ECE)", title_fontsize=10)
    return figure


def plot_shift(analysis: Mapping[str, Any]) -> Any:
    """Accuracy on original and shifted images.

    Args:
        analysis: With the section "shift".
    """
    rows = [row for row in analysis["shift"] if row["original"] is not None]
    figure = new_figure(1.4 + 0.5 * max(1, len(rows)))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        before, after = 100 * row["original"], 100 * row["shifted"]
        axes.plot([before, after], [place, place], color="#999999", linewidth=2, zorder=1)
        first, second = ("original", "shifted") if place == 0 else (None, None)
        axes.scatter([before], [place], color=SKY, edgecolors=BLACK, s=70, label=first, zorder=2)
        axes.scatter([after], [place], color=VERMILION, edgecolors=BLACK, marker="D", s=60, label=second, zorder=2)
        middle = ((before + after) / 2, place)
        axes.annotate(f"{after - before:+.1f}", middle, (0, 9), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(rows)), [f"{_name(row)} ({row['images']:,} images)" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.8)
    axes.set_xlim(-2, 102)
    tidy(axes, title="Accuracy on shifted images, classes of both sets", x="balanced accuracy in %")
    if rows:
        legend(axes, loc="best")
    return figure


def _name(row: Mapping[str, Any]) -> str:
    units = {"noise": "", "blur": " px"}
    return short(row["name"]) + (f" {row['strength']:g}{units[row['kind']]}" if row["kind"] in units else "")


def _curve(axes: Any, row: Mapping[str, Any], name: str, colour: str, marker: str) -> None:
    images = np.array(row["images"])
    if not images.sum():
        return
    confidence, accuracy = 100 * numbers(row["confidence"]), 100 * numbers(row["accuracy"])
    filled = images > 0
    sizes = 20 + 150 * images[filled] / images.sum()
    axes.plot(confidence[filled], accuracy[filled], color=colour, linewidth=1, alpha=0.6)
    label = f"{name}: {100 * row['error']:.1f} %"
    axes.scatter(confidence[filled], accuracy[filled], s=sizes, color=colour, marker=marker, label=label)
