"""What the metrics refuse: labels and counts that are none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpt_peft.errors import InputError


def as_integers(name: str, values: Tensor | Sequence[int], size: int | None = None) -> Tensor:
    """A private int64 copy on the CPU: labels (B,) from 0 to `size` - 1; without `size`, counts (C,) of at least 0."""
    if size is None:
        mend = "Count labels by torch.bincount(labels, minlength=num_classes)."
    else:
        mend = (
            f"Labels go from 0 to {size - 1}, by the entries of class_counts; scores become labels by .argmax(dim=1)."
        )
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be a tensor or sequence of integers: {error}. {mend}") from error
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"{name} must be integers (N,), not {tensor.dtype} of shape {tuple(tensor.shape)}. {mend}")
    tensor = tensor.to(torch.int64, copy=True)
    if size is None and len(tensor) == 0:
        raise InputError(f"{name} is empty, but every class needs an entry. {mend}")
    outside = tensor < 0 if size is None else (tensor < 0) | (tensor >= size)
    if outside.any():
        place = first_true(outside)
        raise InputError(f"{name}[{place}]={tensor[place]} is {'negative' if size is None else 'out of range'}. {mend}")
    return tensor


def first_true(mask: Tensor) -> int:
    """Index of the first True of (N,)."""
    return int(mask.nonzero()[0])
