"""Tables on a terminal of any width."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from io import StringIO

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lpt_peft._text import number, printable
from lpt_peft.cli.common.streams import print_text
from lpt_peft.metrics import ShotResult
from lpt_peft.metrics.result import SHOTS

_FIGURES = (*SHOTS, "accuracy", "worst_accuracy")
_EXTREMES = 5
_UNLIMITED = 1_000_000  # columns, in a file or a pipe


def print_results(results: Mapping[str, ShotResult]) -> None:
    """Print a row for each split, in percent, and the shot rule."""
    if not results:
        print_text("There is neither a validation nor a test split, so nothing was measured.")
        return
    header = ("%", *(figure.removesuffix("_accuracy") for figure in _FIGURES), "images")
    rows = [
        (name, *(_percent(getattr(result, figure)) for figure in _FIGURES), f"{result.num_images:,}")
        for name, result in results.items()
    ]
    print_table(rows, header)
    for rule in dict.fromkeys(result.rule for result in results.values()):
        print_text(rule)


def print_extremes(result: ShotResult, class_names: Sequence[str], class_counts: Sequence[int], split: str) -> None:
    """Print the five worst and best classes; of equal accuracies, those with more training images first."""
    found = [(accuracy, label) for label, accuracy in enumerate(result.per_class) if accuracy is not None]
    if not found:
        return
    never = sum(accuracy == 0 for accuracy, _ in found)
    print_text(f"{split}: {never} of {number(len(found), 'class')} never right")
    for title, sign in (("worst", 1), ("best", -1)):
        first = sorted(found, key=lambda entry: (sign * entry[0], -class_counts[entry[1]]))[:_EXTREMES]
        classes = ", ".join(f"{class_names[c]} {100 * accuracy:.0f} % ({class_counts[c]:,})" for accuracy, c in first)
        print_text(f"  {title}: {classes}")


def print_table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print rows of cells, the first column to the left and the others to the right.

    A table that is wider than the terminal becomes a paragraph for each row, so that no word is broken. Characters that
    cannot be printed are replaced.
    """
    cells = [[printable(cell, 10_000) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=bool(header), header_style="")
    for column, name in enumerate(header or [""] * len(cells[0])):
        table.add_column(Text(name), justify="right" if column else "left", no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))  # Text: brackets in a path or a class name are not markup
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED
    text = StringIO()
    console = Console(file=text, width=_UNLIMITED, color_system=None)
    if Measurement.get(console, console.options, table).maximum <= width:
        console.print(table)
        print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))
        return
    for row in cells:
        print(row[0])
        for place, cell in enumerate(row[1:], 1):
            print(f"  {header[place]}: {cell}" if header else f"  {cell}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
