"""Tables on a terminal, by rich."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lpt_peft.metrics import ShotResult
from lpt_peft.metrics.result import SHOTS

_FIGURES = (*SHOTS, "accuracy", "worst_accuracy")
_NO_END = 10_000  # columns: into a file or a pipe, no line is folded


def print_results(results: Mapping[str, ShotResult], *, as_json: bool) -> None:
    """One row for each part, in percent, and the rule that says what many and few are; or one JSON object."""
    if as_json:
        print(json.dumps({name: result.to_dict() for name, result in results.items()}, indent=2, allow_nan=False))
        return
    if not results:
        print("There was neither a validation nor a test part, so nothing was measured.")
        return
    header = ("%", *(figure.removesuffix("_accuracy") for figure in _FIGURES), "images")
    rows = [
        (name, *(_percent(getattr(result, figure)) for figure in _FIGURES), f"{result.num_images:,}")
        for name, result in results.items()
    ]
    print_table(rows, header)
    for rule in dict.fromkeys(result.rule for result in results.values()):
        print(rule)


def print_table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Cells as they are, the first column to the left and the others to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=bool(header), header_style="bold")
    for place, name in enumerate(header or [""] * len(rows[0])):
        table.add_column(Text(name), justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: brackets in a path or a class name are no markup
    Console(width=None if sys.stdout.isatty() else _NO_END).print(table)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
