"""Predictions and shot metrics of a trained model on a map-style dataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lpt_peft.errors import InputError
from lpt_peft.metrics import ShotMetrics, ShotResult
from lpt_peft.recipe.loading.loader import image_loader, resolve_workers
from lpt_peft.recipe.parallel import place


class Evaluation:
    """Shot metrics on one dataset, any number of times with the same worker processes.

    Args:
        model: Called as `model(images, return_output=True)`: an adapter, or anything alike. On its device.
        dataset: Yields (image, label).
        batch_size: Images at a time.
        num_workers: Processes that load images; None chooses, see `TrainSettings.num_workers`.
        distributed: Share the images out among the processes, each counted once; all must call it, and all get the
            result for the whole. False: this process alone looks at all.
        accelerator: Its mixed precision is used; None computes in the model's own dtypes.
        persistent: Keep the workers from one call to the next.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset[Any],
        *,
        batch_size: int = 128,
        num_workers: int | None = None,
        distributed: bool = False,
        accelerator: Accelerator | None = None,
        persistent: bool = False,
    ) -> None:
        if distributed:
            rank, processes = place()
            dataset = Subset(dataset, range(rank, len(dataset), processes))  # type: ignore[arg-type]
        self._model, self._distributed, self._accelerator = model, distributed, accelerator
        self._loader = _loader(model, dataset, batch_size, num_workers, persistent)

    def __call__(self, metrics: ShotMetrics) -> ShotResult:
        """Reset `metrics`, feed them and compute; the model's mode is left as it was.

        Args:
            metrics: Carries the class counts of training and the rule of the shot groups.
        """
        metrics.reset()
        for output, labels in _batches(self._model, self._loader, self._accelerator):
            metrics.update(output[0], labels)
        return (metrics.sync() if self._distributed else metrics).compute()


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    metrics: ShotMetrics,
    *,
    batch_size: int = 128,
    num_workers: int | None = None,
    distributed: bool = False,
    accelerator: Accelerator | None = None,
) -> ShotResult:
    """Shot metrics on a dataset: `metrics` is reset, fed and computed.

    Only the logits are used, and on an accelerator their predictions are fetched once, at the end.

    Args:
        model: As in `Evaluation`, like all that follows.
        dataset: Yields (image, label).
        metrics: Carries the class counts of training and the rule of the shot groups.
        batch_size: Images at a time.
        num_workers: Processes that load images; None chooses.
        distributed: Share the images out among the processes.
        accelerator: Its mixed precision is used.
    """
    evaluation = Evaluation(
        model,
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        distributed=distributed,
        accelerator=accelerator,
    )
    return evaluation(metrics)


def predict(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int = 128,
    num_workers: int | None = None,
    accelerator: Accelerator | None = None,
) -> tuple[Any, Tensor]:
    """Outputs and labels of a whole dataset, in its order; the model's mode is left as it was.

    Args:
        model: Called as `model(images, return_output=True)`: an adapter, or anything alike.
        dataset: Yields (image, label).
        batch_size: Images at a time.
        num_workers: Processes that load images; None chooses, see `TrainSettings.num_workers`.
        accelerator: Its mixed precision is used; None computes in the model's own dtypes.

    Returns:
        The model's output type with every tensor on the CPU, (N, ...), and labels (N,) int64.

    Raises:
        InputError: The dataset is empty, or its images are no tensors of one shape.
    """
    if not len(dataset):  # type: ignore[arg-type]
        raise InputError("The dataset is empty: there is nothing to predict.")
    outputs, labels = [], []
    for output, target in _batches(model, _loader(model, dataset, batch_size, num_workers), accelerator):
        outputs.append(type(output)(*(tensor.cpu() for tensor in output)))
        labels.append(target)
    joined = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return type(outputs[0])(*joined), torch.cat(labels)


def _loader(
    model: nn.Module, dataset: Dataset[Any], batch_size: int, num_workers: int | None, persistent: bool = False
) -> DataLoader[Any]:
    workers = resolve_workers(num_workers, dataset, batch_size)
    pin = next(model.parameters()).device.type == "cuda"
    return image_loader(dataset, batch_size=batch_size, num_workers=workers, pin_memory=pin, persistent=persistent)


@torch.no_grad()
def _batches(
    model: nn.Module, loader: DataLoader[Any], accelerator: Accelerator | None
) -> Iterator[tuple[Any, Tensor]]:
    """Outputs on the model's device and labels on the CPU, batch by batch."""
    device, mode = next(model.parameters()).device, model.training
    model.eval()
    try:
        for images, labels in loader:
            with nullcontext() if accelerator is None else accelerator.autocast():
                output = model(images.to(device, non_blocking=True), return_output=True)
            yield output, labels
    finally:
        model.train(mode)
