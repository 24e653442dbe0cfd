"""Input validation for the analysis functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lpt_peft._features import check_features
from lpt_peft._numerics import at_least_float32
from lpt_peft.errors import InputError
from lpt_peft.metrics.checks import as_integers, first_true

_CHUNK_BYTES = 2**25
"""Size of the temporary tensors of a chunk."""
_MOST_CLASSES = 2**31


def check_rows(name: str, features: Any, width: int | None = None) -> None:
    """Check finite floating-point features (N, d), N at least 1; `width` is the required d, None accepts any.

    Raises:
        InputError: Another type, shape, or a value that is NaN or infinite.
    """
    hint = "pass one feature per image"
    if isinstance(features, Tensor) and width is None and features.ndim == 2:
        width = features.shape[1]
    check_features(name, features, width or 1, rows="N", hint=hint)
    if not len(features) or not features.shape[1]:
        raise InputError(f"{name} of shape {tuple(features.shape)} is empty: {hint}.")
    for rows in chunks(len(features), 8 * features.shape[1]):
        finite = features[rows].isfinite().all(1)
        if not bool(finite.all()):
            raise InputError(
                f"{name}[{rows.start + first_true(~finite)}] contains NaN or infinity: compute features of valid "
                "images, in float32 if the model overflows in half precision."
            )


def check_labels(name: str, labels: Any, rows: int, num_classes: int | None) -> Tensor:
    """Return labels (N,) as int64 on the CPU after checking them against `rows` and `num_classes`, if it is known.

    Raises:
        InputError: Not integers from 0 to `num_classes` - 1, or not `rows` of them.
    """
    checked = as_integers(name, labels, _MOST_CLASSES if num_classes is None else num_classes)
    if len(checked) != rows:
        raise InputError(f"{name} has {len(checked)} labels for {rows} rows: pass a label for each row.")
    return checked


def check_correct(correct: Any, total: Any) -> tuple[Tensor, Tensor]:
    """Return the correct and all images of each class, (C,) int64 on the CPU.

    Raises:
        InputError: Not integers of at least 0, of different lengths, or more correct images than images.
    """
    right, images = as_integers("correct", correct), as_integers("total", total)
    if len(right) != len(images):
        raise InputError(f"correct has {len(right)} classes, total has {len(images)}: pass one entry per class.")
    if bool((right > images).any()):
        raise InputError(f"correct exceeds total for class {first_true(right > images)}. Pass correct before total.")
    return right, images


def chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices of `rows`, in order, each with temporary tensors of about 32 MiB.

    Example:
        >>> list(chunks(5, 2**24))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    size = max(1, _CHUNK_BYTES // max(1, row_bytes))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def unit_rows(features: Tensor) -> Tensor:
    """Rows (N, d) divided by their norm, at least float32; a zero row stays zero."""
    return torch.nn.functional.normalize(at_least_float32(features), dim=1)
