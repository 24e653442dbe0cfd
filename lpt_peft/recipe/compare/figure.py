"""The figure of a comparison: a dot and its interval for each row."""

from __future__ import annotations

from pathlib import Path

from lpt_peft.errors import MissingExtraError
from lpt_peft.metrics.result import SHOTS
from lpt_peft.recipe.compare.results import Comparison, Figure

_COLOURS = {"overall": "#000000", "many": "#0072B2", "medium": "#E69F00", "few": "#D55E00"}
"""Okabe and Ito's palette, which colour-blind readers can distinguish; the markers differ as well."""
_MARKERS = {"overall": "o", "many": "^", "medium": "s", "few": "v"}


def draw(comparison: Comparison, path: Path) -> None:
    """Write the figure as PNG, 1200 pixels wide and legible at 800; matplotlib's global state is left unchanged.

    Args:
        comparison: With at least one row.
        path: The file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an optional extra
        from matplotlib.figure import Figure as Canvas  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingExtraError(f'The figure needs {error.name}: pip install "lpt_peft[demo]".') from error
    rows = list(comparison.rows)
    figure = Canvas(figsize=(8, 1.7 + 0.5 * len(rows)), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        _point(left, row.figures["overall"], place, "overall")
        values = [value for result in row.results if (value := result.overall) is not None]
        left.plot([100 * value for value in values], [place + 0.25] * len(values), "|", color="0.3", markersize=8)
        for number, shot in enumerate(SHOTS[1:]):
            _point(right, row.figures[shot], place + 0.24 * (number - 1), shot)
    baseline = next((row.figures["overall"] for row in rows if row.name == comparison.baseline), None)
    if baseline is not None:
        left.axvline(100 * baseline.mean, color="0.6", linestyle="--", linewidth=1, zorder=0)
    left.set_yticks(range(len(rows)), [row.name for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_title("All classes" + ("" if baseline is None else f"; dashed: {comparison.baseline}"), fontsize=11)
    right.set_title("By training images of the class", fontsize=11)
    for axes in (left, right):
        axes.set_xlabel(f"balanced {comparison.split} accuracy in %")
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(labelsize=10)
    handles = [right.plot([], [], _MARKERS[s], color=_COLOURS[s], label=s)[0] for s in SHOTS[1:]]
    figure.legend(handles=handles, loc="outside lower right", ncols=3, fontsize=10, frameon=False)
    figure.savefig(path)


def _point(axes: object, figure: Figure | None, place: float, shot: str) -> None:
    if figure is None:
        return
    low, high = figure.interval
    mean, colour = 100 * figure.mean, _COLOURS[shot]
    axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=2)  # type: ignore[attr-defined]
    axes.plot([mean], [place], _MARKERS[shot], color=colour, markersize=7)  # type: ignore[attr-defined]
