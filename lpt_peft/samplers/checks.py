"""Input validation for the samplers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set, ValuesView
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from lpt_peft._numbers import checked_integer
from lpt_peft.errors import ConfigError, InputError

Labels = Sequence[int] | npt.NDArray[Any] | Tensor
_LARGEST = np.iinfo(np.int64).max
Rows = npt.NDArray[np.int64]


def checked_labels(labels: Labels) -> Rows:
    """Check labels (N,) and return them as int64."""
    if isinstance(labels, Dataset):
        raise InputError(f"labels is a dataset ({type(labels).__name__}): pass its labels, often dataset.targets.")
    if isinstance(labels, (str, bytes, Mapping, Set, ValuesView, Iterator)):
        raise InputError(
            f"labels is a {type(labels).__name__}: pass a list, an array or a tensor with the class of every image, in "
            "the order of the images."
        )
    if isinstance(labels, np.ma.MaskedArray) and np.ma.is_masked(labels):
        raise InputError("labels have masked entries: remove unlabeled images.")
    try:
        array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels cannot be converted to a one-dimensional integer array: {error}") from error
    if array.size == 0:
        raise InputError("labels are empty: pass the class of every training image.")
    if array.ndim != 1:
        hint = "pass one class per image"
        if array.ndim == 2:
            hint = "pass labels[:, 0]" if array.shape[1] == 1 else "for one-hot rows, pass labels.argmax(1)"
        raise InputError(f"labels must be one-dimensional, not of shape {tuple(array.shape)}: {hint}.")
    if array.dtype.kind == "O":
        array = _from_objects(array)
    if array.dtype.kind not in "iu":
        hint = "encode the classes as integers from 0"
        if array.dtype.kind == "f":
            missing = int(np.isnan(array).sum())
            convert = "labels.long()" if isinstance(labels, Tensor) else "labels.astype(int)"
            hint = f"remove images without a label ({missing})" if missing else f"convert them with {convert}"
        raise InputError(f"labels must be integers, not {array.dtype}: {hint}.")
    if array.min() < 0:
        raise InputError(
            f"labels must be at least 0, but labels[{array.argmin()}] is {array.min()}: remove unlabeled images."
        )
    if array.max() > _LARGEST:
        raise InputError(_too_large(int(array.argmax()), int(array.max())))
    return array.astype(np.int64)


def _from_objects(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Convert an array of Python integers, such as a column of a table."""
    try:
        labels = [checked_integer(f"labels[{index}]", value, 0) for index, value in enumerate(array)]
    except ConfigError as error:
        raise InputError(f"{error} Encode the classes as integers from 0, and remove unlabeled images.") from error
    if max(labels) > _LARGEST:
        raise InputError(_too_large(labels.index(max(labels)), max(labels)))
    return np.array(labels)


def _too_large(index: int, label: int) -> str:
    return f"labels[{index}]={label} is too large: encode the classes as integers from 0."


def checked_replica(num_replicas: int | None, rank: int | None) -> tuple[int, int] | None:
    """Check world size and rank and return both; None means that torch.distributed provides them."""
    if (num_replicas is None) != (rank is None):
        raise ConfigError(
            f"num_replicas={num_replicas} and rank={rank}: pass both, or neither to use those of torch.distributed."
        )
    if num_replicas is None:
        return None
    num_replicas = checked_integer("num_replicas", num_replicas, 1)
    return num_replicas, checked_integer("rank", rank, 0, num_replicas - 1)


def current_replica() -> tuple[int, int]:
    """World size and rank of torch.distributed; (1, 0) if it is not initialized."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0
