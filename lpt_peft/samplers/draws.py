"""Infinite index sequences that depend only on (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.signedinteger[Any]]
Key = tuple[int, int]  # seed, epoch
BLOCK_ROWS = 2**14  # indices generated at a time; changing it changes the order
_INSTANCES, _CLASSES, _MEMBERS = range(3)  # purposes of generators, so that no two purposes share random numbers


def instance_balanced(images: int, key: Key, start: int, size: int) -> Iterator[Rows]:
    """Yield random permutations of all images, without end, in chunks of `size` beginning at index `start`."""
    passes = max(1, BLOCK_ROWS // images)

    def block(number: int) -> Rows:
        return _shuffled(_generator(key, _INSTANCES, number), images, passes)

    return _chunks(block, passes * images, start, size)


def class_balanced(class_of: npt.NDArray[np.integer[Any]], run: int, key: Key, start: int, size: int) -> Iterator[Rows]:
    """Yield runs of `run` images of every class in random order, without end, in chunks of `size` from `start`."""
    counts = np.bincount(class_of)
    first = np.cumsum(counts) - counts
    order = _integers_below(len(class_of))
    _generator(key, _MEMBERS).shuffle(order)
    members = order[np.argsort(class_of[order], kind="stable")]  # sorted by class, shuffled within each class
    cycles = max(1, BLOCK_ROWS // (len(counts) * run))

    def block(number: int) -> Rows:
        generator = _generator(key, _CLASSES, number)
        classes = _shuffled(generator, len(counts), cycles)[:, None]
        # A run is a cyclic window over the shuffled images of its class, so it repeats none if there are enough.
        sizes = counts[classes]
        return members[first[classes] + (generator.integers(sizes) + np.arange(run)) % sizes].ravel()

    return _chunks(block, cycles * len(counts) * run, start, size)


def _generator(key: Key, *purpose: int) -> np.random.Generator:
    seed, epoch = key
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, *purpose)))


def _shuffled(generator: np.random.Generator, size: int, times: int) -> Rows:
    """Concatenate `times` random permutations of the integers below `size`: (times * size,)."""
    rows = np.tile(_integers_below(size), (times, 1))
    return generator.permuted(rows, axis=1, out=rows).ravel()


def _integers_below(size: int) -> Rows:
    """0 to `size - 1` in 32 bits if they fit, which saves memory; the order of a shuffle does not depend on it."""
    return np.arange(size, dtype=np.int32 if size <= 2**31 else np.int64)


def _chunks(block: Callable[[int], Rows], length: int, start: int, size: int) -> Iterator[Rows]:
    """Split the sequence `block(0), block(1), ...` (`length` each) into chunks of `size`, from index `start`."""
    number, skip = divmod(start, length)
    rows = block(number)[skip:]
    while True:
        while len(rows) < size:
            number += 1
            rows = np.concatenate([rows, block(number)])
        yield rows[:size]
        rows = rows[size:]
