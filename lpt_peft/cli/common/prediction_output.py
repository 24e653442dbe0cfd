"""Predictions on standard output as a table, a JSON list, JSON lines or CSV, written while they come."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from lpt_peft.cli.common.streams import dump_json
from lpt_peft.cli.common.tables import print_table

Format = Literal["table", "json", "jsonl", "csv"]
Answer = Mapping[str, Any]
"""`Prediction.to_dict()`, and "rejected" if there is a least probability."""


class Writer(Protocol):
    """Writes answers in a format."""

    def write(self, answers: Sequence[Answer]) -> None:
        """Write the answers of a batch and flush, so that an interruption does not lose them."""

    def close(self) -> None:
        """Write the end of the document; also after an interruption, so that what was written can be read."""


def make_writer(output_format: Format, show: int, rejects: bool) -> Writer:
    """Make the writer of a format.

    Args:
        output_format: Its name.
        show: Classes of each answer.
        rejects: Whether answers have the key "rejected".
    """
    makers: dict[Format, Callable[[], Writer]] = {
        "table": TableWriter,
        "json": JsonWriter,
        "jsonl": JsonLinesWriter,
        "csv": lambda: CsvWriter(show, rejects),
    }
    return makers[output_format]()


class TableWriter:
    """Rows for people, aligned within a batch; images that cannot be read have no row."""

    def write(self, answers: Sequence[Answer]) -> None:
        """Print a row for each image that was read."""
        if rows := [_row(answer) for answer in answers if "classes" in answer]:
            print_table(rows)
        sys.stdout.flush()

    def close(self) -> None:
        """A table has no end."""


class JsonWriter:
    """A list with an object for each image."""

    def __init__(self) -> None:
        self._separator = "["

    def write(self, answers: Sequence[Answer]) -> None:
        """Print the objects, without the end of the list."""
        for answer in answers:
            print(self._separator, dump_json(answer), sep="\n", end="")
            self._separator = ","
        sys.stdout.flush()

    def close(self) -> None:
        """Print the end of the list."""
        print("[\n]" if self._separator == "[" else "\n]")


class JsonLinesWriter:
    """An object on a line for each image."""

    def write(self, answers: Sequence[Answer]) -> None:
        """Print the lines."""
        for answer in answers:
            print(dump_json(answer))
        sys.stdout.flush()

    def close(self) -> None:
        """The last line is complete."""


class CsvWriter:
    """A row for each image: "image", "class", "label", "probability", then "class_2" and so on, "rejected" and "error".

    Args:
        show: Classes of each answer.
        rejects: Whether there is a column "rejected".
    """

    def __init__(self, show: int, rejects: bool) -> None:
        names = ("class", "label", "probability")
        self._classes = [(name, rank, f"{name}_{rank + 1}" if rank else name) for rank in range(show) for name in names]
        columns = ["image", *(column for _, _, column in self._classes), *(["rejected"] * rejects), "error"]
        self._writer = csv.DictWriter(_LineFeeds(), columns)
        self._has_header = False

    def write(self, answers: Sequence[Answer]) -> None:
        """Print the rows; the header before the first."""
        if not self._has_header:
            self._writer.writeheader()
            self._has_header = True
        for answer in answers:
            row = {key: answer[key] for key in ("image", "rejected", "error") if key in answer}
            if classes := answer.get("classes"):
                row |= {column: classes[rank][name] for name, rank, column in self._classes}
            self._writer.writerow(row)
        sys.stdout.flush()

    def close(self) -> None:
        """The last row is complete."""


class _LineFeeds:
    """Standard output for rows that end in a carriage return and a line feed; only the line feed is written.

    Before Python 3.13, `csv` does not quote a carriage return in a path unless rows end in it.
    """

    def write(self, row: str) -> None:
        sys.stdout.write(row.removesuffix("\r\n") + "\n")


def _row(answer: Answer) -> tuple[str, ...]:
    first, *others = map(_cell, answer["classes"])
    return (answer["image"], f"rejected ({first})" if answer.get("rejected") else first, *others)


def _cell(entry: Mapping[str, Any]) -> str:
    return f"{entry['class']} {entry['probability']:.1%}"
