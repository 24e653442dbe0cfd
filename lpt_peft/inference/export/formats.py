"""Formats of an export, and names of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from lpt_peft._json import dumps
from lpt_peft._text import printable

ExportFormat = Literal["onnx", "pt2", "aoti"]
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
FILE_NAMES: dict[ExportFormat, str] = {"onnx": "model.onnx", "pt2": "model.pt2", "aoti": "model.pt2"}
DESCRIPTION = "model.json"
"""Name of the description, beside the graph and inside a program of torch.export."""
TASKS = "tasks"
"""Folder of the tasks in an export with exchangeable tasks."""

Runner = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Runs a file: tensors by the names of inputs, on the CPU, to tensors by the names of outputs."""


def metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """Convert a description to strings: JSON of values that are not strings."""
    return {key: value if isinstance(value, str) else dumps(value) for key, value in description.items()}


def reason(error: Exception) -> str:
    """Shorten the message of another library's error to a part of a sentence."""
    return printable(" ".join(str(error).split()) or type(error).__name__, 300).rstrip(".")
