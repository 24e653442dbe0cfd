"""Picture of a learning-rate range test."""

from __future__ import annotations

from pathlib import Path

from lpt_peft.recipe.learning_rate.curve import LearningRateCurve


def draw_learning_rates(curve: LearningRateCurve, path: Path) -> None:
    """Draw losses against rates, with the suggestion, as PNG; matplotlib's global state is not used.

    Args:
        curve: Result of `find_learning_rate`.
        path: File to write; its folder exists.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an optional library, slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(7, 4), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(curve.rates, curve.losses, ".", color="0.65", label="loss of a step")
    axes.plot(curve.rates, curve.smoothed, color="tab:blue", linewidth=2, label="smoothed")
    if curve.suggestion is not None:
        axes.axvline(curve.suggestion, color="tab:orange", label=f"suggestion: {curve.suggestion:g}")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.1 * max(curve.smoothed[0], *curve.smoothed))
    axes.set_xlabel("learning_rate")
    axes.set_ylabel("training loss")
    axes.set_title(f"Learning-rate range test, phase {curve.phase}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path)
