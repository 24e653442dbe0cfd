"""Results of `gpu.py` as Markdown and JSON."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from _measure import device_name

import lpt_peft

COLUMNS = ("eval", "step")
BASE = {"eval": "plain ViT", "step": "full tuning"}  # the row that ratios in a column refer to


@dataclass
class Cell:
    """A method in evaluation or in a training step."""

    row: str
    column: str
    state: str = "measured"
    """Or why there is no number: "does not exist", "dropped", "out of memory" or "failed"."""
    error: str = ""
    trained: int = 0
    """Number of trained parameters."""
    samples: list[float] = field(default_factory=list)
    """Seconds of a call, one sample for each round."""
    peak_bytes: int | None = None

    @property
    def median(self) -> float | None:
        """Median seconds of a call."""
        return statistics.median(self.samples) if self.samples else None


@dataclass
class Table:
    """The cells of a precision, batch size and mode."""

    precision: str
    batch: int
    mode: str
    cells: list[Cell]

    @property
    def title(self) -> str:
        """Title for headings and messages."""
        return f"{self.precision}, batch {self.batch}, {self.mode}"

    def cell(self, row: str, column: str) -> Cell:
        """Return the cell of a row and column."""
        return next(cell for cell in self.cells if (cell.row, cell.column) == (row, column))

    def ratio(self, cell: Cell) -> float | None:
        """Ratio to the plain ViT in evaluation, to full tuning in a training step."""
        base = self.cell(BASE[cell.column], cell.column).median
        return cell.median / base if cell.median and base else None

    def lines(self) -> Iterator[str]:
        """Markdown lines."""
        rounds = sorted({len(cell.samples) for cell in self.cells if cell.samples})
        yield f"### {self.title}"
        yield ""
        yield f"Median of {' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))} rounds." if rounds else "-"
        yield ""
        yield "| | trained parameters | eval | step | eval, peak | step, peak |"
        yield "|---|---|---|---|---|---|"
        for row in dict.fromkeys(cell.row for cell in self.cells):
            evaluation, step = (self.cell(row, column) for column in COLUMNS)
            figures = [self._time(evaluation), self._time(step), _size(evaluation), _size(step)]
            yield f"| {row} | {f'{step.trained:,}' if step.trained else '-'} | {' | '.join(figures)} |"
        yield ""

    def _time(self, cell: Cell) -> str:
        if cell.median is None:
            return "-" if cell.state == "does not exist" else cell.state
        ratio = self.ratio(cell)
        return f"{1e3 * cell.median:.2f} ms" if ratio is None else f"{ratio:.2f} ({1e3 * cell.median:.2f} ms)"


@dataclass
class LossTime:
    """Times of forward and backward of a loss."""

    name: str
    classes: int
    batch: int
    samples: list[float]


@dataclass
class Report:
    """All measurements of a run, its settings and its device."""

    settings: dict[str, Any]
    device: torch.device
    image_size: int
    tables: list[Table]
    losses: list[LossTime] = field(default_factory=list)
    seconds: float = 0.0

    def dropped(self) -> list[str]:
        """Tables with cells that the time budget dropped; the cells are listed unless the whole table was dropped."""
        names = []
        for table in self.tables:
            cells = [cell for cell in table.cells if cell.state == "dropped"]
            all_dropped = len(cells) == sum(cell.state != "does not exist" for cell in table.cells)
            which = "" if all_dropped else f" ({', '.join(f'{cell.row}: {cell.column}' for cell in cells)})"
            names += [table.title + which] if cells else []
        return names

    def about(self) -> dict[str, str]:
        """Device and versions."""
        return {
            "device": device_name(self.device),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "lpt_peft": lpt_peft.__version__,
            "cuda": str(torch.version.cuda),
            "python": platform.python_version(),
            "float32 matmul": torch.get_float32_matmul_precision(),
        }

    def markdown(self) -> str:
        """The report as Markdown, for a terminal or a page."""
        s = self.settings
        lines = [
            ", ".join(f"{name} {value}" for name, value in self.about().items()) + ".",
            f"{s['model']}, {self.image_size} px, {s['classes']} classes, prompt length {s['prompt_length']}. "
            "Ratio to the plain ViT (eval) and to full tuning (step), and milliseconds. "
            "The full-tuning row evaluates the plain ViT again: the distance of its ratio from 1 is the noise.",
            "",
        ]
        for table in self.tables:
            lines += table.lines()
        lines += self._loss_lines()
        dropped, failed = self.dropped(), [(t, c) for t in self.tables for c in t.cells if c.state == "failed"]
        lines += [f"Failed: {table.title}: {cell.row}, {cell.column}: {cell.error}" for table, cell in failed]
        dropped_by = f"Dropped to fit the time budget of {s['budget']:g} s: "
        lines.append(dropped_by + "; ".join(dropped) + "." if dropped else "Nothing was dropped.")
        lines.append(f"{self.seconds:.0f} s in all.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON content."""
        tables = [
            {
                "precision": table.precision,
                "batch": table.batch,
                "mode": table.mode,
                "cells": [
                    {**vars(cell), "median_seconds": cell.median, "ratio": table.ratio(cell)} for cell in table.cells
                ],
            }
            for table in self.tables
        ]
        return {
            "about": self.about(),
            "settings": self.settings,
            "image_size": self.image_size,
            "tables": tables,
            "losses": [{**vars(loss), "median_seconds": statistics.median(loss.samples)} for loss in self.losses],
            "dropped": self.dropped(),
            "seconds": self.seconds,
        }

    def _loss_lines(self) -> Iterator[str]:
        if not self.losses:
            return
        classes = list(dict.fromkeys(loss.classes for loss in self.losses))
        times = {(loss.name, loss.classes): statistics.median(loss.samples) for loss in self.losses}
        names = list(dict.fromkeys(loss.name for loss in self.losses))
        yield f"### losses alone, forward and backward, batch {self.losses[0].batch}, float32, eager"
        yield ""
        yield f"| | {' | '.join(f'C = {number:,}' for number in classes)} |"
        yield "|---" * (len(classes) + 1) + "|"
        for name in names:
            cells = (
                f"{times[name, number] / times[names[0], number]:.2f} ({1e3 * times[name, number]:.3f} ms)"
                for number in classes
            )
            yield f"| {name} | {' | '.join(cells)} |"
        yield ""


def _size(cell: Cell) -> str:
    return "-" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**20:,.0f} MiB"
