"""Base class of the samplers: labels, rank, epoch and a resumable position."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from lpt_peft._numbers import checked_integer
from lpt_peft.errors import InputError
from lpt_peft.samplers.checks import Labels, Rows, checked_labels, checked_replica, current_replica

_T = TypeVar("_T")


class EpochSampler(Sampler[_T]):
    """Base class with checked labels, the rank, the epoch and the position in the epoch."""

    def __init__(
        self, labels: Labels, samples_per_class: int, seed: int, num_replicas: int | None, rank: int | None
    ) -> None:
        label_array = checked_labels(labels)
        classes, self._class_of = _distinct(label_array)
        if len(classes) == 1:
            raise InputError(
                f"labels contain a single class ({classes[0]}), so there is nothing to balance: "
                f"pass the labels of all training images, or use torch.utils.data.RandomSampler."
            )
        self._num_classes = len(classes)
        self._samples_per_class = checked_integer("samples_per_class", samples_per_class, 1)
        self._seed = checked_integer("seed", seed, 0)
        self._given_replica = checked_replica(num_replicas, rank)
        self._labels_crc32 = zlib.crc32(np.ascontiguousarray(label_array, dtype="<i8").data)
        self._epoch = self._start = self._position = 0

    @property
    def _replica(self) -> tuple[int, int]:
        """World size and rank, read at every use because a process group may be created after the sampler."""
        return current_replica() if self._given_replica is None else self._given_replica

    @abstractmethod
    def _sizes(self, num_replicas: int) -> dict[str, int]:
        """Settings of the subclass that determine the order."""

    @abstractmethod
    def _length(self, num_replicas: int) -> int:
        """Number of items that each rank yields in an epoch."""

    @abstractmethod
    def _draw(self, epoch: int, start: int, num_replicas: int, rank: int) -> Iterator[_T]:
        """Yield the items of an epoch, beginning with number `start`."""

    def _settings(self) -> dict[str, int]:
        """Settings that a saved position depends on. The rank is excluded, so all ranks can load the same state."""
        num_replicas, _ = self._replica
        return {
            "labels_crc32": self._labels_crc32,
            "samples_per_class": self._samples_per_class,
            "seed": self._seed,
            "num_replicas": num_replicas,
            **self._sizes(num_replicas),
        }

    def __len__(self) -> int:
        """Number of batches (`DualSampler`) or indices (`ClassBalancedSampler`) that this rank yields in an epoch."""
        return self._length(self._replica[0])

    def __repr__(self) -> str:
        num_replicas, rank = self._replica
        fields = {
            "images": len(self._class_of),
            "classes": self._num_classes,
            **self._sizes(num_replicas),
            "samples_per_class": self._samples_per_class,
            "seed": self._seed,
            "epoch": self._epoch,
            "num_replicas": num_replicas,
            "rank": rank,
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in fields.items())})"

    def __iter__(self) -> Iterator[_T]:
        # A DataLoader with workers calls iter() twice and drops the first iterator, so only next() may consume a loaded
        # position.
        start, self._start = self._start, 0
        for position, item in enumerate(self._draw(self._epoch, start, *self._replica), start + 1):
            self._position = position
            yield item

    @property
    def epoch(self) -> int:
        """The epoch that determines the order of the next iteration."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. Call it before each epoch; otherwise every epoch has the same order.

        A position loaded by `load_state_dict` is kept if it belongs to this epoch, so a resumed loop can call this too.

        Args:
            epoch: Integer of at least 0.

        Raises:
            ConfigError: `epoch` is not an integer of at least 0.
        """
        epoch = checked_integer("epoch", epoch, 0)
        if epoch != self._epoch:
            self._epoch, self._start, self._position = epoch, 0, 0

    def state_dict(self, position: int | None = None) -> dict[str, int]:
        """Return the position in the epoch and the settings it depends on: JSON-ready ints, equal on all ranks.

        Args:
            position: Number of items of this epoch (batches of a `DualSampler`, otherwise indices) that training has
                used, counted from the start of the epoch, also after resuming. None means the items yielded so far,
                which is correct if the sampler is iterated directly. DataLoader workers fetch items in advance, so
                with workers pass the position explicitly: `sampler.state_dict(position=step + 1)`.

        Raises:
            ConfigError: `position` is not from 0 to `len(self)`.
        """
        position = self._position if position is None else checked_integer("position", position, 0, len(self))
        return {**self._settings(), "epoch": self._epoch, "position": position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore a saved position: the next iteration yields exactly the rest of that epoch.

        Args:
            state: Result of `state_dict` on any rank. The number of ranks is compared, so load the state after
                torch.distributed is initialized.

        Raises:
            InputError: The state belongs to another sampler, other labels or other settings (the message lists the
                differences), or its position is out of range. The sampler is then unchanged.
        """
        settings = self._settings()
        expected = {*settings, "epoch", "position"}
        if not isinstance(state, Mapping) or set(state) != expected:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise InputError(
                f"The state of a {type(self).__name__} has the keys {sorted(expected)}, not {found}: "
                f"pass the result of state_dict() of the same sampler class."
            )
        differences = [
            f"{name} is {value} here and {state[name]} in the state"
            for name, value in settings.items()
            if state[name] != value
        ]
        if differences:
            raise InputError(
                f"The state belongs to another draw: {'; '.join(differences)}. Create the sampler with the settings of "
                f"the saved state, or restart the epoch with set_epoch()."
            )
        epoch = checked_integer("state['epoch']", state["epoch"], 0, error=InputError)
        position = checked_integer("state['position']", state["position"], 0, len(self), error=InputError)
        self._epoch, self._start, self._position = epoch, position, position


def _distinct(labels: Rows) -> tuple[Rows, npt.NDArray[np.unsignedinteger[Any]]]:
    """Distinct labels in ascending order, and the position of every label among them.

    As `np.unique` with `return_inverse`, but without a sort unless labels are much larger than their number, and with
    positions in 1 byte for at most 256 classes and in 2 bytes for at most 65,536.
    """
    if labels.max() > 2**16 + 4 * len(labels):
        classes, positions = np.unique(labels, return_inverse=True)
        return classes, positions.astype(np.min_scalar_type(len(classes) - 1))
    present = np.bincount(labels) > 0
    classes = np.flatnonzero(present)
    return classes, (np.cumsum(present) - 1).astype(np.min_scalar_type(len(classes) - 1))[labels]
