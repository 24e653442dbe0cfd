"""The batches of a phase: which images every process sees at every step, and how they are cropped.

Both follow from (seed, phase, step) alone, so a phase can begin at any step. Not here: how indices are drawn
(`lpt_peft.samplers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lpt_peft.recipe.loading.loader import image_loader, resolve_workers
from lpt_peft.recipe.randomness import kept_random_state, seed_of, start_at
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.samplers import DualSampler
from lpt_peft.samplers.draws import instance_balanced

Row = tuple[int, int]  # place in the phase's whole draw, index into the dataset


def steps_per_epoch(size: int, settings: TrainSettings) -> int:
    """Steps in which the instance-balanced half sees every image at least once."""
    return size // settings.batch_size + 1


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
    """This process's share of every step of a phase, from step `start` on: images (2 B / R, ...), labels (2 B / R,).

    Args:
        dataset: Yields (image, label).
        labels: Class of every item.
        settings: Batch size, sampling, seed, workers.
        phase: Its name; other phases crop otherwise.
        epochs: Of the phase.
        start: Step to begin with, counted from the beginning of the phase.
        num_replicas: Processes.
        rank: This one.
        pin_memory: For copies to an accelerator that the host does not wait for.
    """
    rows = _Rows(labels, settings, epochs=epochs, start=start, num_replicas=num_replicas, rank=rank)
    workers = resolve_workers(settings.num_workers, dataset, 2 * settings.batch_size // num_replicas)
    images = Seeded(dataset, (settings.seed, phase))
    return image_loader(images, batch_sampler=rows, num_workers=workers, pin_memory=pin_memory)


def cut_halves(images: Tensor, target: Tensor, number: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Cut a batch of two halves, (2 B, ...) and (2 B,), into `number` batches of two halves."""
    if number == 1:
        return [(images, target)]
    pairs = zip(*(half.chunk(number) for half in images.chunk(2)), strict=True)
    labels = zip(*(half.chunk(number) for half in target.chunk(2)), strict=True)
    return ((torch.cat(pair), torch.cat(label)) for pair, label in zip(pairs, labels, strict=True))


class _Rows(Sampler[list[Row]]):
    """All steps of a phase in one go: worker processes start once, and fetch ahead over the end of an epoch."""

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
        self._share = settings.batch_size // num_replicas
        self._ranks, self._rank = num_replicas, rank
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
        epoch, position = divmod(self._start, self._steps)
        step = self._start
        for number in range(epoch, self._epochs):
            for indices in self._epoch(number, position if number == epoch else 0):
                yield list(zip(self._places(step), indices, strict=True))
                step += 1

    def _epoch(self, epoch: int, position: int) -> Iterator[list[int]]:
        if self._dual is not None:
            self._dual.set_epoch(epoch)
            self._dual.load_state_dict(self._dual.state_dict(position=position))
            yield from self._dual
            return
        size = 2 * self._share * self._ranks
        rows = instance_balanced(self._size, (self._seed, epoch), position * size, size)
        for row in islice(rows, self._steps - position):
            halves = row.reshape(2, self._ranks, self._share)[:, self._rank]  # as a dual batch is shared out
            yield halves.ravel().tolist()

    def _places(self, step: int) -> list[int]:
        """Where this rank's rows lie among those of all ranks and steps: both halves, one after the other."""
        half = self._share * self._ranks
        first = 2 * half * step + self._rank * self._share
        return [*range(first, first + self._share), *range(first + half, first + half + self._share)]


class Seeded(Dataset[Any]):
    """A dataset whose random transforms depend on a row's place in the draw alone."""

    def __init__(self, dataset: Dataset[Any], key: tuple[int, str]) -> None:
        self._dataset = dataset
        self._key = key

    def __getitems__(self, rows: list[Row]) -> list[Any]:
        with kept_random_state():
            return [self._item(place, index) for place, index in rows]

    def _item(self, place: int, index: int) -> Any:
        start_at(seed_of(*self._key, "image", place))
        return self._dataset[index]
