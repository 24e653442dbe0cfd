"""A cell of a comparison, one row with one seed: its folder, and what was measured while it ran."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lpt_peft._json import BrokenRule, boolean, integer, list_of, loads, nullable, number, object_of, one_of
from lpt_peft.errors import StateError
from lpt_peft.recipe.experiment import write_json

MEASURED, LOG = "cell.json", "log.txt"
_FIELDS = {
    "format_version": integer(1, 1),
    "splits": list_of(one_of("validation", "test"), 0, 2),
    "seconds": nullable(number),
    "running": boolean,
    "peak_memory_bytes": nullable(integer(0)),
    "memory": nullable(one_of("gpu", "process")),
    "incomplete": boolean,
}
_NEW: dict[str, Any] = {
    "format_version": 1,
    "splits": [],
    "seconds": 0.0,
    "running": False,
    "peak_memory_bytes": None,
    "memory": None,
    "incomplete": False,
}


@dataclass(frozen=True)
class Cell:
    """One row with one seed; `folder` is an ordinary output folder of `fit`."""

    row: str
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"


def measured(folder: Path) -> dict[str, Any]:
    """Return what `measuring` recorded in a folder, or the values of a cell that never ran.

    Returns:
        splits: Evaluated splits; empty if the cell is not finished.
        seconds: Time of all processes that worked on the cell; None if one of them was killed, so that it is unknown.
        peak_memory_bytes: Largest memory of the last process: allocated by torch on a GPU, otherwise resident.
        memory: "gpu" or "process": the kind of `peak_memory_bytes`.
        incomplete: Whether images were left out.
        running: Whether the last process did not end, or was killed.

    Raises:
        StateError: The record is damaged.
    """
    file = folder / MEASURED
    if not file.exists():
        return dict(_NEW)
    record = loads(file.read_bytes(), str(file), StateError)
    try:
        object_of(_FIELDS)(record, "")
    except BrokenRule as error:
        raise StateError(f"{file} is damaged: {error}. Remove it to run the cell again from its checkpoint.") from error
    return record


@contextmanager
def measuring(folder: Path, splits: list[str]) -> Iterator[dict[str, Any]]:
    """Record time and memory of the work on a cell; the body may set "incomplete".

    Args:
        folder: Of the cell.
        splits: Recorded as evaluated if the body ends without an error.

    Raises:
        StateError: The folder is not writable, or the record is damaged.
    """
    record = measured(folder)
    before = None if record["running"] else record["seconds"]
    record |= {"splits": [], "seconds": before, "running": True}
    write_json(folder / MEASURED, record)
    start = time.perf_counter()
    try:
        yield record
        record["splits"] = splits
    finally:
        seconds = None if before is None else before + time.perf_counter() - start
        record |= {"seconds": seconds, "running": False} | _memory()
        write_json(folder / MEASURED, record)


def _memory() -> dict[str, Any]:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(), "memory": "gpu"}
    try:
        import resource  # noqa: PLC0415 - Windows has none
    except ModuleNotFoundError:
        return {"peak_memory_bytes": None, "memory": None}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "memory": "process"}
