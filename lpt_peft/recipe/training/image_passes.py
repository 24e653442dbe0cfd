"""Passes over training images before a phase: queries, class sums of features, and chosen images.

Images are read as in training, with its random crops, but without class-balanced draws. A crop depends on the seed, the
purpose of the pass and the image, so it is the same in every process and in a resumed run. Not here: the parameters
that start from these passes (`phase_init.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from lpt_peft._random import seeded
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.data.workers import open_batches
from lpt_peft.heads import class_sums
from lpt_peft.recipe.loading.batches import SeededDataset
from lpt_peft.recipe.loading.loader import image_loader, resolve_workers
from lpt_peft.recipe.parallel import gather_strided
from lpt_peft.recipe.progress import Reporter
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.starts import eval_mode

MAX_QUERIES = 50_000
Batches = Iterator[tuple[Tensor, Tensor]]


def query_indices(size: int) -> list[int]:
    """Images whose queries are computed: all, or at most 50,000 that are evenly spaced."""
    return list(range(0, size, -(-size // MAX_QUERIES)))


class ImagePasses:
    """Passes over the training images of a run.

    Args:
        dataset: Yields (image, label).
        settings: `batch_size`, `num_workers` and `seed` are used.
        accelerator: Device, mixed precision and processes.
        reporter: Shows the progress of long passes.
    """

    def __init__(
        self, dataset: Dataset[Any], settings: TrainSettings, accelerator: Accelerator, reporter: Reporter
    ) -> None:
        self.size: int = len(dataset)  # type: ignore[arg-type]
        self._dataset, self._settings = dataset, settings
        self._accelerator, self._reporter = accelerator, reporter

    @torch.no_grad()
    def queries(self, adapter: LongTailPromptAdapter) -> Tensor:
        """Queries (N, key_dim) of the images of `query_indices`, float32 or wider; all processes must call it."""
        indices = query_indices(self.size)
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        share = indices[rank::processes]
        share += share[-1:] * (-(-len(indices) // processes) - len(share))  # equally many on every process
        with eval_mode(adapter), self.batches(share, "queries") as batches:
            queries = torch.cat([adapter.queries(images) for images, _ in batches])
        queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
        return gather_strided(self._accelerator, queries, len(indices))

    @torch.no_grad()
    def class_sums(self, model: nn.Module) -> Tensor:
        """Sums (C, d) of the features of each class over all images; all processes must call it.

        Args:
            model: Has a `head` with a weight (C, d), and `features(images)` returns features (B, d).
        """
        head: Any = model.get_submodule("head")
        compute: Any = model.features
        sums = class_sums(head.weight[:0], torch.empty(0, dtype=torch.int64), len(head.weight))
        share = range(self._accelerator.process_index, self.size, self._accelerator.num_processes)
        with eval_mode(model), self.batches(share, "class means") as batches:
            for images, target in batches:
                sums += class_sums(compute(images), target, len(head.weight))
        total: Tensor = self._accelerator.reduce(sums, "sum")
        return total

    @contextmanager
    def batches(self, indices: Sequence[int], purpose: str) -> Iterator[Batches]:
        """Batches of images on the device and labels, in the order of the indices, in the precision of the run.

        Args:
            indices: Positions in the dataset; they may repeat.
            purpose: Name for the progress; with the seed and the position of an image, it determines its crop.
        """
        settings, device = self._settings, self._accelerator.device
        loader = image_loader(
            SeededDataset(self._dataset, (settings.seed, purpose)),
            batch_size=settings.batch_size,
            sampler=[(index, index) for index in indices],  # rows whose position is the image's index
            num_workers=resolve_workers(settings.num_workers, self._dataset, settings.batch_size),
            pin_memory=device.type == "cuda",
        )
        with seeded(settings.seed, device), self._accelerator.autocast(), open_batches(loader) as loaded:
            moved = ((images.to(device, non_blocking=True), labels) for images, labels in loaded)
            yield self._reporter.track(moved, purpose, len(loader))
