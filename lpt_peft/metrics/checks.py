"""Input validation for the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lpt_peft._classes import counts_in_order
from lpt_peft.errors import InputError

Counts = Tensor | Sequence[int] | Mapping[int, int]


def as_integers(name: str, values: Counts, size: int | None = None) -> Tensor:
    """Copy to int64 on the CPU: labels (B,) from 0 to `size` - 1 or, without `size`, counts (C,) of at least 0."""
    if size is None:
        hint = "Count labels with torch.bincount(labels, minlength=num_classes)."
        values = counts_in_order(values, name)
    else:
        hint = f"Labels go from 0 to {size - 1}, the indices of class_counts."
    if isinstance(values, (list, tuple)) and any(getattr(entry, "ndim", 0) for entry in values):
        raise InputError(f"{name} must be one-dimensional, not a {type(values).__name__} of arrays or tensors. {hint}")
    try:
        tensor = torch.as_tensor(np.array(values) if _is_column(values) else values, device="cpu")
        tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be a tensor or sequence of integers, not {_describe(values)}. {hint}") from error
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        if size is not None and tensor.ndim == 2:
            hint = (
                f"Pass {name}.squeeze(1)."
                if tensor.shape[1] == 1
                else f"Convert rows of scores with {name}.argmax(dim=1)."
            )
        elif size is not None and tensor.ndim == 1:
            hint = f"Convert class indices with {name}.long(). {hint}"
        raise InputError(f"{name} must be integers (N,), not {tensor.dtype} of shape {tuple(tensor.shape)}. {hint}")
    tensor = tensor.to(torch.int64, copy=True)
    if size is None and len(tensor) == 0:
        raise InputError(f"{name} is empty, but every class needs an entry. {hint}")
    outside = tensor < 0 if size is None else (tensor < 0) | (tensor >= size)
    if outside.any():
        index = first_true(outside)
        raise InputError(f"{name}[{index}]={tensor[index]} is {'negative' if size is None else 'out of range'}. {hint}")
    return tensor


def first_true(mask: Tensor) -> int:
    """Index of the first True in (N,)."""
    return int(mask.nonzero()[0])


def _describe(values: object) -> str:
    """The first entry that is not an integer, or the type of a value without entries."""
    if isinstance(values, (list, tuple)):
        for index, value in enumerate(values):
            if not hasattr(value, "__index__"):
                return f"a {type(values).__name__} whose entry {index} is {value!r:.50}"
    return f"a {type(values).__name__}"


def _is_column(values: object) -> bool:
    """Whether a value is a column of a table, such as a pandas Series, which torch reads by its index."""
    return hasattr(values, "__array__") and not isinstance(values, (Tensor, np.ndarray))
