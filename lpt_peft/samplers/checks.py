"""Input validation for the samplers, and the rank of this process."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from lpt_peft.errors import ConfigError, InputError

Labels = Sequence[int] | npt.NDArray[Any] | Tensor
Rows = npt.NDArray[np.int64]


def checked_labels(labels: Labels) -> Rows:
    """Labels (N,) as int64, all at least 0."""
    if isinstance(labels, Dataset):
        raise InputError(f"labels is a dataset ({type(labels).__name__}); pass its labels, often dataset.targets.")
    try:
        array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    except (TypeError, ValueError) as error:
        raise InputError(f"labels cannot be read as one row of whole numbers: {error}") from error
    if array.size == 0:
        raise InputError("labels are empty; pass the class of every training image.")
    if array.ndim != 1:
        raise InputError(
            f"labels must be one-dimensional, not of shape {tuple(array.shape)}; give one class per image, "
            f"for example labels.argmax(1) of one-hot rows."
        )
    if array.dtype.kind not in "iu":
        raise InputError(f"labels must be whole numbers, not {array.dtype}; encode the classes as 0, 1, 2, ...")
    if array.min() < 0:
        raise InputError(
            f"labels must be at least 0, but labels[{array.argmin()}] is {array.min()}; leave unlabelled images out."
        )
    return array.astype(np.int64)


def whole(name: str, value: Any, low: int, high: int | None = None, error: type[ValueError] = ConfigError) -> int:
    """A whole number from `low` to `high`."""
    bound = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < low or (high is not None and number > high):
        raise error(f"{name}={value!r} must be {bound}.")
    return number


def checked_replica(num_replicas: int | None, rank: int | None) -> tuple[int, int] | None:
    """World size and rank as given; None if both are to come from torch.distributed."""
    if (num_replicas is None) != (rank is None):
        raise ConfigError(
            f"num_replicas={num_replicas} and rank={rank}: give both, or neither to take them from torch.distributed."
        )
    if num_replicas is None:
        return None
    num_replicas = whole("num_replicas", num_replicas, 1)
    return num_replicas, whole("rank", rank, 0, num_replicas - 1)


def current_replica() -> tuple[int, int]:
    """World size and rank of torch.distributed; (1, 0) while it is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0
