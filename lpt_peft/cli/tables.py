"""Results as aligned columns for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from lpt_peft.metrics import ShotResult

_FIGURES = ("overall", "many", "medium", "few", "accuracy", "worst_accuracy")


def results_table(results: Mapping[str, ShotResult]) -> str:
    """One row for each part, in percent, and the rule that says what many and few are."""
    if not results:
        return "There was neither a validation nor a test part, so nothing was measured."
    header = ("%", *(figure.removesuffix("_accuracy") for figure in _FIGURES), "images")
    rows = [
        (name, *(_percent(getattr(result, figure)) for figure in _FIGURES), f"{result.num_images:,}")
        for name, result in results.items()
    ]
    rules = dict.fromkeys(result.rule for result in results.values())
    return "\n".join([aligned([header, *rows]), *rules])


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Cells in columns, the first one to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
