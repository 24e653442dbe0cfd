"""Predictions and shot metrics of a trained model on a map-style dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lpt_peft.errors import InputError
from lpt_peft.metrics import ShotMetrics, ShotResult
from lpt_peft.recipe.checks import collate
from lpt_peft.recipe.parallel import place


def predict(
    model: nn.Module, dataset: Dataset[Any], *, batch_size: int = 128, num_workers: int = 0
) -> tuple[Any, Tensor]:
    """Outputs and labels of a whole dataset, in its order; the model's mode is left as it was.

    Args:
        model: Called as `model(images, return_output=True)`: an adapter, or anything alike.
        dataset: Yields (image, label).
        batch_size: Images at a time.
        num_workers: Processes that load images.

    Returns:
        The model's output type with every tensor on the CPU, (N, ...), and labels (N,) int64.

    Raises:
        InputError: The dataset is empty, or its images are no tensors of one shape.
    """
    if not len(dataset):  # type: ignore[arg-type]
        raise InputError("The dataset is empty: there is nothing to predict.")
    outputs, labels = zip(*_batches(model, dataset, batch_size, num_workers), strict=True)
    joined = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return type(outputs[0])(*joined), torch.cat(labels)


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    metrics: ShotMetrics,
    *,
    batch_size: int = 128,
    num_workers: int = 0,
    distributed: bool = False,
) -> ShotResult:
    """Shot metrics on a dataset: `metrics` is reset, fed and computed.

    Args:
        model: As in `predict`.
        dataset: Yields (image, label).
        metrics: Carries the class counts of training and the rule of the shot groups.
        batch_size: Images at a time.
        num_workers: Processes that load images.
        distributed: Share the images out among the processes, each counted once; all must call it, and all get the
            result for the whole. False: this process alone looks at all.
    """
    metrics.reset()
    if distributed:
        rank, processes = place()
        dataset = Subset(dataset, range(rank, len(dataset), processes))  # type: ignore[arg-type]
    for output, labels in _batches(model, dataset, batch_size, num_workers):
        metrics.update(output[0], labels)
    return (metrics.sync() if distributed else metrics).compute()


@torch.no_grad()
def _batches(
    model: nn.Module, dataset: Dataset[Any], batch_size: int, num_workers: int
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    device, mode = next(model.parameters()).device, model.training
    model.eval()
    try:
        # A generator of its own: the loader would draw a seed from the caller's.
        for images, labels in DataLoader(
            dataset, batch_size, num_workers=num_workers, collate_fn=collate, generator=torch.Generator()
        ):
            output = model(images.to(device), return_output=True)
            yield type(output)(*(tensor.cpu() for tensor in output)), labels
    finally:
        model.train(mode)
