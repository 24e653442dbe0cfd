"""The endless rows of indices behind an epoch: pure functions of (seed, epoch), made in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lpt_peft.samplers.checks import Rows

Key = tuple[int, int]  # seed, epoch
BLOCK_ROWS = 2**14  # rows made at a time; part of the order: another value is another draw
_INSTANCES, _CLASSES, _MEMBERS = range(3)  # what a generator is for: no two purposes share random numbers


def instance_balanced(images: int, key: Key, start: int, size: int) -> Iterator[Rows]:
    """Endless: every image once in random order, then all again; in pieces of `size` from row `start` on."""
    passes = max(1, BLOCK_ROWS // images)

    def block(number: int) -> Rows:
        return _shuffled(_generator(key, _INSTANCES, number), images, passes)

    return _pieces(block, passes * images, start, size)


def class_balanced(class_of: Rows, run: int, key: Key, start: int, size: int) -> Iterator[Rows]:
    """Endless: every class once in random order, `run` images of each, then all again; pieces as above."""
    counts = np.bincount(class_of)
    first = np.cumsum(counts) - counts
    order = _generator(key, _MEMBERS).permutation(len(class_of))
    members = order[np.argsort(class_of[order], kind="stable")]  # class after class, shuffled within each
    cycles = max(1, BLOCK_ROWS // (len(counts) * run))

    def block(number: int) -> Rows:
        generator = _generator(key, _CLASSES, number)
        classes = _shuffled(generator, len(counts), cycles)[:, None]
        # A run is `run` neighbours on the ring of a class's shuffled images: no image twice if there are enough.
        ring = counts[classes]
        return members[first[classes] + (generator.integers(ring) + np.arange(run)) % ring].ravel()

    return _pieces(block, cycles * len(counts) * run, start, size)


def _generator(key: Key, *purpose: int) -> np.random.Generator:
    seed, epoch = key
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, *purpose)))


def _shuffled(generator: np.random.Generator, size: int, times: int) -> Rows:
    """The numbers below `size` in random order, `times` times over: (times * size,) int64."""
    return generator.permuted(np.tile(np.arange(size, dtype=np.int64), (times, 1)), axis=1).ravel()


def _pieces(block: Callable[[int], Rows], length: int, start: int, size: int) -> Iterator[Rows]:
    """Cut the endless rows `block(0), block(1), ...` (`length` each) into pieces of `size`, from row `start` on."""
    number, skip = divmod(start, length)
    rows = block(number)[skip:]
    while True:
        while len(rows) < size:
            number += 1
            rows = np.concatenate([rows, block(number)])
        yield rows[:size]
        rows = rows[size:]
