"""Figure of the digits run: accuracy against class count, and the groups chosen for each class."""

from __future__ import annotations

from pathlib import Path

from lpt_peft.data.digits import digits_counts
from lpt_peft.demo.result import DemoResult


def draw(result: DemoResult, path: Path) -> None:
    """Write the figure as PNG, without touching matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(12, 4.8), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    counts = digits_counts()
    for row, marker in zip(result.rows, "sD^ov", strict=True):
        bold = row.name == "LPT"
        left.plot(
            counts,
            [100 * accuracy for accuracy in row.per_class()],
            marker=marker,
            linewidth=2.5 if bold else 1.2,
            label=f"{row.name}: {100 * row.mean('overall'):.1f}",
            zorder=3 if bold else 2,
        )
    left.set_xscale("log")
    left.set_xticks(counts, [f"{count}\n“{digit}”" for digit, count in enumerate(counts)])
    left.minorticks_off()
    left.invert_xaxis()
    left.set_ylim(-3, 103)
    left.set_xlabel("training images of the class (and the digit)")
    left.set_ylabel("test accuracy in %")
    seeds = len(result.seeds)
    left.set_title("Accuracy by class count" + (f", mean of {seeds} seeds" if seeds > 1 else ""))
    left.grid(alpha=0.3)
    left.legend(title="overall (mean over classes)", fontsize=9, title_fontsize=9, loc="lower left")

    image = right.imshow(result.groups_per_class, cmap="magma", vmin=0, vmax=1, aspect="auto")
    right.set_xlabel("group of the pool")
    right.set_ylabel("digit (training images)")
    right.set_xticks(range(len(result.groups_per_class[0])))
    right.set_yticks(range(len(counts)), [f"{digit} ({count})" for digit, count in enumerate(counts)])
    right.set_title("Groups chosen for the test images of a class")
    figure.colorbar(image, ax=right, label="share of the class's images")
    figure.savefig(path)
