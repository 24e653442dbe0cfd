"""The table of classes and its CSV, and the text of numbers and names in a report."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any, NamedTuple

from lpt_peft._text import number, printable
from lpt_peft.analysis.proportion import wilson_interval

STATIC_ROWS = 300
"""Rows that a page holds as HTML; larger tables are shown in steps by the script."""
_NAME, _CSV_NAME = 60, 1000
_CSV_COLUMNS = (
    *("label", "class", "training_images", "shot", "evaluated_images", "correct", "accuracy", "low", "high"),
    *("most_confused_with", "confused_images"),
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Column(NamedTuple):
    """A column of a sortable table."""

    title: str
    kind: str
    """"text", "number" or "shot"; numbers are sorted by the first number of the text."""


class Table(NamedTuple):
    """A table whose first column names the rows."""

    columns: list[Column]
    rows: list[list[str]]

    @property
    def is_long(self) -> bool:
        """Whether only the first rows are HTML."""
        return len(self.rows) > STATIC_ROWS


def class_table(analysis: Mapping[str, Any]) -> Table:
    """Names, training images, accuracies with Wilson intervals and confusions; frequent classes first."""
    classes = analysis["classes"]
    low, high = _bounds(classes)
    columns = [
        Column("class", "text"),
        Column("training images", "number"),
        Column("shot", "shot"),
        Column("accuracy", "number"),
        Column("95 % interval", "number"),
        Column("evaluated images", "number"),
        Column("most confused with", "text"),
    ]
    rows = []
    for label in by_frequency(classes):
        other = classes["confused_with"][label]
        confused = "–"
        if other is not None:
            confused = f"{clip(classes['name'][other])} ({classes['confused_images'][label]:,})"
        measured = bool(classes["images"][label])
        rows.append(
            [
                clip(classes["name"][label]),
                f"{classes['train_images'][label]:,}",
                classes["shots"][label],
                percent(classes["accuracy"][label]),
                f"{100 * low[label]:.1f} to {100 * high[label]:.1f}" if measured else "–",
                f"{classes['images'][label]:,}",
                confused,
            ]
        )
    return Table(columns, rows)


def by_frequency(classes: Mapping[str, Any]) -> list[int]:
    """Labels, from the class with most training images to that with fewest."""
    counts = classes["train_images"]
    return sorted(range(len(counts)), key=lambda label: -counts[label])


def csv_link(analysis: Mapping[str, Any]) -> str:
    """A data URI of a CSV file with a line for each class, in label order.

    A name that a spreadsheet would run as a formula has an apostrophe in front.
    """
    classes = analysis["classes"]
    low, high = _bounds(classes)
    text = StringIO()
    writer = csv.writer(text)
    writer.writerow(_CSV_COLUMNS)
    for label, name in enumerate(classes["name"]):
        other, measured = classes["confused_with"][label], bool(classes["images"][label])
        writer.writerow(
            [
                label,
                _cell(name),
                classes["train_images"][label],
                classes["shots"][label],
                classes["images"][label],
                classes["correct"][label],
                classes["accuracy"][label],
                *((round(low[label], 4), round(high[label], 4)) if measured else ("", "")),
                "" if other is None else _cell(classes["name"][other]),
                classes["confused_images"][label],
            ]
        )
    content = base64.b64encode(("\ufeff" + text.getvalue()).encode("utf-8", "replace")).decode()
    return f"data:text/csv;charset=utf-8;base64,{content}"


def percent(value: float | None) -> str:
    r"""A fraction in percent, a dash for None.

    Example:
        >>> percent(0.5), percent(None)
        ('50.0\xa0%', '–')
    """
    return "–" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%".replace("-", "−")


def count(images: int, noun: str) -> str:
    """A count with separators, and its noun.

    Example:
        >>> count(1, "class"), count(8142, "class")
        ('1 class', '8,142 classes')
    """
    return number(images, noun).replace(str(images), f"{images:,}", 1)


def points(value: float, *, sign: bool = True) -> str:
    r"""A difference in percentage points.

    Example:
        >>> points(-0.012), points(0.012, sign=False)
        ('−1.2\xa0points', '1.2\xa0points')
    """
    rounded = round(100 * value, 1) + 0.0  # no negative zero
    return f"{rounded:{'+' if sign else ''}.1f}\N{NO-BREAK SPACE}points".replace("-", "−")


def with_interval(interval: Mapping[str, float] | None, form: Callable[[float], str] = percent) -> str:
    r"""An estimate and its interval.

    Example:
        >>> with_interval({"estimate": 0.5, "low": 0.4, "high": 0.6})
        '50.0\xa0% (40.0 to 60.0)'
    """
    if interval is None:
        return "–"
    low, high = (form(interval[bound]).rpartition("\N{NO-BREAK SPACE}")[0] for bound in ("low", "high"))
    return f"{form(interval['estimate'])} ({low} to {high})"


def clip(name: str, most: int = _NAME) -> str:
    """A name of limited length in printable characters."""
    text = printable(name, most + 1)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _bounds(classes: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    low, high = wilson_interval(classes["correct"], classes["images"])
    return low.tolist(), high.tolist()


def _cell(name: str) -> str:
    text = clip(name, _CSV_NAME)
    return f"'{text}" if text.startswith(_FORMULA) else text
