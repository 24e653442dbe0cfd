"""Pictures of features: neighbours and gamma of each state, discriminant planes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lpt_peft.analysis.plots.style import BLUE, ORANGE, PALETTE, STATES, annotate_bars, new_figure, short, tidy

_MARKERS = "os^Dv"


def plot_features(analysis: Mapping[str, Any]) -> Any:
    """k-NN accuracy and gamma of the plain ViT, the shared prompt and the trained model.

    Args:
        analysis: With the section "features".
    """
    features = analysis["features"]
    names = [STATES[state][0] for state in features]
    colours = [STATES[state][1] for state in features]
    panels: list[tuple[str, str, list[float | None], str]] = []
    for k in (1, 20):
        values = [(row.get(f"knn_{k}") or {}).get("balanced_accuracy") for row in features.values()]
        if any(value is not None for value in values):
            percent = [None if value is None else 100 * value for value in values]
            panels.append((f"{k}-NN accuracy", "mean over classes in %", percent, "{:.1f}"))
    panels.append(("gamma: smaller is better", "intra / inter", [row["gamma"] for row in features.values()], "{:.2f}"))
    figure = new_figure(3.4)
    for axes, (title, label, values, form) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        heights = [np.nan if value is None else value for value in values]
        bars = axes.bar(range(len(values)), heights, color=colours, width=0.7)
        annotate_bars(axes, bars, ["-" if value is None else form.format(value) for value in values])
        axes.set_xticks(range(len(values)), [name.replace(" ", "\n", 1) for name in names])
        axes.margins(y=0.15)
        tidy(axes, title=title, y=label)
        axes.grid(visible=False, axis="x")
    return figure


def plot_projection(analysis: Mapping[str, Any]) -> Any:
    """Test images of some classes in the plane of the linear discriminants, for each state.

    Args:
        analysis: With the sections "projection" and "classes".
    """
    projection, classes = analysis["projection"], analysis["classes"]
    states = projection["states"]
    figure = new_figure(4.2)
    for axes, (state, row) in zip(np.atleast_1d(figure.subplots(1, len(states))), states.items(), strict=True):
        points, labels = np.array(row["points"]), np.array(row["label"])
        for number, label in enumerate(projection["classes"]):
            own = points[labels == label]
            axes.scatter(
                *own.T,
                s=10,
                color=PALETTE[number % len(PALETTE)],
                marker=_MARKERS[number // 2 % len(_MARKERS)],
                label=f"{short(classes['name'][label], 16)} ({classes['train_images'][label]:,})",
                alpha=0.75,
                linewidths=0,
            )
        tidy(
            axes,
            title=STATES[state][0],
            x="first discriminant",
            y="second discriminant" if state == next(iter(states)) else "",
        )
    handles, texts = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        texts,
        loc="outside lower center",
        ncols=5,
        fontsize=10,
        title="class (training images)",
        markerscale=1.5,
        frameon=False,
    )
    return figure


def plot_pretraining(analysis: Mapping[str, Any]) -> Any:
    """Images like those of the pretraining and test images on the axis that separates them, for each state.

    Args:
        analysis: With the section "pretraining".
    """
    states = analysis["pretraining"]["states"]
    figure = new_figure(3.8)
    for axes, (state, row) in zip(np.atleast_1d(figure.subplots(1, len(states))), states.items(), strict=True):
        for name, label, colour in (("first", "like pretraining", BLUE), ("second", "test images", ORANGE)):
            axes.scatter(*np.array(row[name]).T, s=10, color=colour, label=label, alpha=0.6, linewidths=0)
        title = f"{STATES[state][0]}: {100 * row['separation']:.0f} %"
        tidy(axes, title=title, x="discriminant of the sets", y="main variation")
    handles, texts = axes.get_legend_handles_labels()
    text = "Images on the correct side of a line between the sets: 50 % if the sets are aligned"
    figure.suptitle(text, x=0.01, ha="left", fontsize=12)
    figure.legend(handles, texts, loc="outside lower center", ncols=2, fontsize=10, markerscale=2.0, frameon=False)
    return figure
