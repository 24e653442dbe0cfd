"""Base of the samplers: checked labels, the rank, the epoch and the position in it that can be saved."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np
from torch.utils.data import Sampler

from lpt_peft.errors import InputError
from lpt_peft.samplers.checks import Labels, checked_labels, checked_replica, current_replica, whole

_T = TypeVar("_T")


class EpochSampler(Sampler[_T]):
    """Checked labels, the rank, the epoch, and the position in it."""

    def __init__(
        self, labels: Labels, samples_per_class: int, seed: int, num_replicas: int | None, rank: int | None
    ) -> None:
        images = checked_labels(labels)
        classes, self._class_of = np.unique(images, return_inverse=True)
        if len(classes) == 1:
            raise InputError(
                f"labels hold one class only ({classes[0]}), so there is nothing to balance; "
                f"pass the labels of the whole training set, or use torch.utils.data.RandomSampler."
            )
        self._num_classes = len(classes)
        self._samples_per_class = whole("samples_per_class", samples_per_class, 1)
        self._seed = whole("seed", seed, 0)
        self._given_replica = checked_replica(num_replicas, rank)
        self._labels_crc32 = zlib.crc32(images.astype("<i8").tobytes())
        self._epoch = self._start = self._position = 0

    @property
    def _replica(self) -> tuple[int, int]:
        """World size and rank, asked for at every use: a process group may begin after the sampler was made."""
        return current_replica() if self._given_replica is None else self._given_replica

    @abstractmethod
    def _sizes(self, num_replicas: int) -> dict[str, int]:
        """Settings of the subclass that the order depends on."""

    @abstractmethod
    def _length(self, num_replicas: int) -> int:
        """Items that each rank yields in an epoch."""

    @abstractmethod
    def _draw(self, epoch: int, start: int, num_replicas: int, rank: int) -> Iterator[_T]:
        """The items of an epoch from number `start` on."""

    def _settings(self) -> dict[str, int]:
        """What a saved position is valid for; not the rank, so that one checkpoint serves all ranks."""
        num_replicas, _ = self._replica
        return {
            "labels_crc32": self._labels_crc32,
            "samples_per_class": self._samples_per_class,
            "seed": self._seed,
            "num_replicas": num_replicas,
            **self._sizes(num_replicas),
        }

    def __len__(self) -> int:
        """Lists (`DualSampler`) or indices (`ClassBalancedSampler`) that this rank yields in a whole epoch."""
        return self._length(self._replica[0])

    def __repr__(self) -> str:
        num_replicas, rank = self._replica
        shown = {
            "images": len(self._class_of),
            "classes": self._num_classes,
            **self._sizes(num_replicas),
            "samples_per_class": self._samples_per_class,
            "seed": self._seed,
            "epoch": self._epoch,
            "num_replicas": num_replicas,
            "rank": rank,
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def __iter__(self) -> Iterator[_T]:
        # All of this happens at the first next(): a DataLoader with workers calls iter() twice and drops the first, so
        # iter() must not use up a loaded position. Once used, the next pass starts at the beginning.
        start, self._start = self._start, 0
        for position, item in enumerate(self._draw(self._epoch, start, *self._replica), start + 1):
            self._position = position
            yield item

    @property
    def epoch(self) -> int:
        """The epoch whose order the next iteration gives."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; call it before each one, else every pass repeats the same order.

        A position set by `load_state_dict` stays if it lies in this epoch, so a resumed loop may call this as well.

        Args:
            epoch: Whole number of at least 0.

        Raises:
            ConfigError: `epoch` is not such a number.
        """
        epoch = whole("epoch", epoch, 0)
        if epoch != self._epoch:
            self._epoch, self._start, self._position = epoch, 0, 0

    def state_dict(self, position: int | None = None) -> dict[str, int]:
        """The position in the epoch, and the settings it is valid for, as ints ready for JSON; equal on all ranks.

        Args:
            position: Items of this epoch (lists of a `DualSampler`, else indices) that training has used, counted from
                the beginning of the epoch, also after a resume. None: those yielded so far, which is right where the
                sampler is iterated directly. The workers of a DataLoader fetch ahead of training, so there the loop
                must say how far it is: `sampler.state_dict(position=step + 1)`.

        Raises:
            ConfigError: `position` is not from 0 to `len(self)`.
        """
        position = self._position if position is None else whole("position", position, 0, len(self))
        return {**self._settings(), "epoch": self._epoch, "position": position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Return to a saved position: the next iteration yields exactly what was left of that epoch.

        Args:
            state: What `state_dict` returned, on any rank. The number of ranks is compared, so load the state after
                torch.distributed is initialised.

        Raises:
            InputError: The state is of another sampler, of other labels or of other settings (the message lists the
                differences), or its position does not exist. The sampler stays as it was.
        """
        settings = self._settings()
        expected = {*settings, "epoch", "position"}
        if not isinstance(state, Mapping) or set(state) != expected:
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise InputError(
                f"The state of a {type(self).__name__} has the keys {sorted(expected)}, not {got}; "
                f"pass what state_dict() of the same sampler class returned."
            )
        differences = [
            f"{name} is {here} here and {state[name]} in the state"
            for name, here in settings.items()
            if state[name] != here
        ]
        if differences:
            raise InputError(
                f"The state belongs to another draw: {'; '.join(differences)}. Build the sampler as it was when the "
                f"state was saved, or begin the epoch anew with set_epoch()."
            )
        epoch = whole("state['epoch']", state["epoch"], 0, error=InputError)
        position = whole("state['position']", state["position"], 0, len(self), error=InputError)
        self._epoch, self._start, self._position = epoch, position, position
