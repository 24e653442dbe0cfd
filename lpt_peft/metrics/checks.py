"""Input validation for the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        hint = f"Labels go from 0 to {size - 1}, the indices of class_counts; scores need .argmax(dim=1)."
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be a tensor or sequence of integers: {error}. {hint}") from error
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
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
