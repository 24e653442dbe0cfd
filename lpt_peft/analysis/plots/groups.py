"""Pictures of the groups: which classes select them, and their value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lpt_peft.analysis.plots.style import BLACK, BLUE, SKY, VERMILION, annotate_bars, new_figure, short, tidy

_MOST_ROWS = 40
_NAMES = {
    "chosen": "chosen groups",
    "random": "random groups",
    "averaged": "mean of all groups",
    "none": "no groups",
    "fixed": "best single group",
    "oracle": "best group per class\n(upper bound)",
}


def plot_matching(analysis: Mapping[str, Any]) -> Any:
    """Share of the images of each class that select each group, and the usage of the groups.

    At most 40 classes are drawn, evenly spaced from frequent to rare.

    Args:
        analysis: With the sections "matching" and "classes".
    """
    matching, classes = analysis["matching"], analysis["classes"]
    histogram, images = np.array(matching["histogram"], dtype=float), np.array(classes["images"])
    counts = np.array(classes["train_images"])
    order = np.argsort(-counts, kind="stable")
    order = order[images[order] > 0]
    rows = order[np.linspace(0, len(order) - 1, min(_MOST_ROWS, len(order))).round().astype(int)]
    shares = histogram[rows] / images[rows][:, None]
    figure = new_figure(3.0 + 0.26 * len(rows))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.3, max(1.6, 0.26 * len(rows))))
    groups = np.arange(histogram.shape[1])
    usage = np.array(matching["usage"]) / max(1, images.sum())
    unused = usage == 0
    upper.bar(groups, 100 * usage, color=BLUE)
    upper.scatter(groups[unused], np.zeros(unused.sum()), marker="x", color=VERMILION, zorder=3, clip_on=False)
    found = f", {unused.sum()} unused (×)" if unused.any() else ""
    tidy(upper, title=f"Usage of the {len(groups)} groups{found}", y="% of images")
    upper.grid(visible=False, axis="x")
    image = lower.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    lower.set_yticks(range(len(rows)), [f"{short(classes['name'][row], 20)} ({counts[row]:,})" for row in rows])
    step = max(1, len(groups) // 20)
    lower.set_xticks(groups[::step])
    information, chance = matching["mutual_information"], matching["chance"]
    text = f"Class and group: {information:.2f} bits of mutual information, {chance:.2f} by chance"
    figure.suptitle(text, x=0.01, ha="left", fontsize=12)
    tidy(lower, title="Groups of each class", x="group", y="class (training images)")
    lower.grid(visible=False)
    bar = figure.colorbar(image, ax=lower, pad=0.01, aspect=40)
    bar.set_label("share of the class's images", fontsize=11)
    return figure


def plot_pool(analysis: Mapping[str, Any]) -> Any:
    """Balanced accuracy with chosen, random, averaged, no and fixed groups, and the differences with their intervals.

    Args:
        analysis: With the section "pool".
    """
    pool = analysis["pool"]
    names = [name for name in _NAMES if name in pool["rows"]]
    values = [100 * (pool["rows"][name]["balanced_accuracy"] or 0.0) for name in names]
    colours = [VERMILION if name == "chosen" else "#BBBBBB" if name == "oracle" else SKY for name in names]
    figure = new_figure(3.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1), sharey=True)
    bars = left.barh(range(len(names)), values, color=colours)
    annotate_bars(left, bars, [f"{value:.1f}" for value in values])
    left.set_yticks(range(len(names)), [_NAMES[name] for name in names])
    left.invert_yaxis()
    left.margins(x=0.15)
    tidy(left, title="Balanced accuracy", x="%")
    left.grid(visible=False, axis="y")
    for row, name in enumerate(names):
        interval = pool["chosen_minus"].get(name)
        if interval is not None:
            low, middle, high = (100 * interval[key] for key in ("low", "estimate", "high"))
            right.plot([low, high], [row, row], color=BLACK, linewidth=1.5)
            right.plot([middle], [row], marker="o", color=BLACK)
    right.axvline(0, color=VERMILION, linewidth=1.2)
    tidy(right, title="Gain of the choice, 95 % interval", x="percentage points")
    right.grid(visible=False, axis="y")
    return figure
