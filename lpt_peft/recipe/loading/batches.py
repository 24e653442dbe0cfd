"""Batches of a phase: the images that each process sees at each step, and their random crops.

Both depend on (seed, phase, step) alone, so a phase can start at any step. Not here: how indices are drawn
(`lpt_peft.samplers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lpt_peft._random import derive_seed, preserve_random_state, seed_all
from lpt_peft.recipe.loading.loader import image_loader, resolve_workers
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.samplers import DualSampler
from lpt_peft.samplers.draws import instance_balanced

Row = tuple[int, int]  # position in the draw of the whole phase, index into the dataset


def steps_per_epoch(size: int, settings: TrainSettings) -> int:
    """Steps in which the instance-balanced half sees each of `size` images at least once."""
    return size // settings.half_batch + 1


def batches(
    dataset: Dataset[Any],
    labels: Sequence[int],
    settings: TrainSettings,
    phase: str,
    *,
    epochs: int,
    start: int = 0,
    num_replicas: int = 1,
    rank: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Build the loader of a phase: this process's share of every step from `start` on.

    Args:
        dataset: Yields (image, label).
        labels: Class of every item.
        settings: Batch size, sampling, seed, workers.
        phase: Name of the phase; each phase crops differently.
        epochs: Of the phase.
        start: First step, counted from the beginning of the phase.
        num_replicas: Number of processes, R.
        rank: Index of this process.
        pin_memory: Load into pinned memory, for asynchronous copies to an accelerator.

    Returns:
        A loader of images (batch_size / R, ...) and labels (batch_size / R,), instance-balanced half first.
    """
    rows = _Rows(labels, settings, epochs=epochs, start=start, num_replicas=num_replicas, rank=rank)
    workers = resolve_workers(settings.num_workers, dataset, settings.batch_size // num_replicas)
    images = SeededDataset(dataset, (settings.seed, phase))
    return image_loader(images, batch_sampler=rows, num_workers=workers, pin_memory=pin_memory)


def split_halves(images: Tensor, target: Tensor, chunks: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Divide a batch of two halves, (B, ...) and (B,), into `chunks` smaller batches of two halves."""
    if chunks == 1:
        return [(images, target)]
    pairs = zip(*(half.chunk(chunks) for half in images.chunk(2)), strict=True)
    labels = zip(*(half.chunk(chunks) for half in target.chunk(2)), strict=True)
    return ((torch.cat(pair), torch.cat(label)) for pair, label in zip(pairs, labels, strict=True))


class _Rows(Sampler[list[Row]]):
    """All steps of a phase in a single pass: workers start once and prefetch across epoch boundaries."""

    def __init__(
        self,
        labels: Sequence[int],
        settings: TrainSettings,
        *,
        epochs: int,
        start: int,
        num_replicas: int,
        rank: int,
    ) -> None:
        self._size, self._seed = len(labels), settings.seed
        self._epochs, self._steps, self._start = epochs, steps_per_epoch(len(labels), settings), start
        self._share = settings.half_batch // num_replicas  # of each half
        self._num_replicas, self._rank = num_replicas, rank
        self._dual: DualSampler | None = None
        if settings.sampling == "dual":
            self._dual = DualSampler(
                labels,
                2 * self._share,
                samples_per_class=settings.samples_per_class,
                num_batches=self._steps,
                seed=settings.seed,
                num_replicas=num_replicas,
                rank=rank,
            )

    def __len__(self) -> int:
        return self._epochs * self._steps - self._start

    def __iter__(self) -> Iterator[list[Row]]:
        first_epoch, position = divmod(self._start, self._steps)
        step = self._start
        for epoch in range(first_epoch, self._epochs):
            for indices in self._epoch(epoch, position if epoch == first_epoch else 0):
                yield list(zip(self._positions(step), indices, strict=True))
                step += 1

    def _epoch(self, epoch: int, position: int) -> Iterator[list[int]]:
        if self._dual is not None:
            self._dual.set_epoch(epoch)
            self._dual.load_state_dict(self._dual.state_dict(position=position))
            yield from self._dual
            return
        size = 2 * self._share * self._num_replicas
        rows = instance_balanced(self._size, (self._seed, epoch), position * size, size)
        for row in islice(rows, self._steps - position):
            halves = row.reshape(2, self._num_replicas, self._share)[:, self._rank]  # shared as a dual batch is
            yield halves.ravel().tolist()

    def _positions(self, step: int) -> list[int]:
        """Positions of this rank's rows among those of all ranks and steps, half after half."""
        half = self._share * self._num_replicas
        first = 2 * half * step + self._rank * self._share
        return [*range(first, first + self._share), *range(first + half, first + half + self._share)]


class SeededDataset(Dataset[Any]):
    """A dataset whose random transforms depend only on a key and a row's position in the draw."""

    def __init__(self, dataset: Dataset[Any], key: tuple[int, str]) -> None:
        self._dataset = dataset
        self._key = key

    def __getitems__(self, rows: list[Row]) -> list[Any]:
        with preserve_random_state():
            return [self._item(position, index) for position, index in rows]

    def _item(self, position: int, index: int) -> Any:
        seed_all(derive_seed(*self._key, "image", position))
        return self._dataset[index]
