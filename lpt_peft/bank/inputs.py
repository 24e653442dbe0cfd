"""Validation of a batch: images and their tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lpt_peft.errors import InputError


def tasks_of(images: Any, tasks: Any) -> list[str | None]:
    """Task of each image, after checks of their number and types.

    Raises:
        InputError: There is no task for each image, or a task is not a name.
    """
    values = images.values() if isinstance(images, Mapping) else [images]
    tensor = next((value for value in values if isinstance(value, Tensor) and value.ndim), None)
    if tensor is None:
        raise InputError(f"images must be a tensor (B, 3, H, W), not {type(images).__name__}.")
    rows = tensor.shape[0]
    if isinstance(tasks, str) or tasks is None:
        tasks = [tasks] * rows
    names = list(tasks)
    if len(names) != rows:
        raise InputError(f"tasks has {len(names)} names and the batch {rows} images: give a task for each image.")
    if not names:
        raise InputError("The batch has no images: give at least 1.")
    if wrong := [name for name in names if name is not None and not isinstance(name, str)]:
        raise InputError(f"tasks must be names of tasks or None for the plain model, not {wrong[0]!r:.80}.")
    return names
