"""Predictions and shot metrics of a trained model on a map-style dataset."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lpt_peft.errors import InputError
from lpt_peft.metrics import ShotMetrics, ShotResult
from lpt_peft.recipe.loading.loader import image_loader, open_batches, resolve_workers, stop_workers
from lpt_peft.recipe.loading.readable import without_replacements
from lpt_peft.recipe.predictions import PredictionRecorder, image_names
from lpt_peft.recipe.progress import Reporter
from lpt_peft.samplers.checks import current_replica


class Evaluation:
    """Shot metrics on a dataset, repeatable with the same worker processes.

    Unreadable images of a `LabelledImages` with `unreadable="skip"` are left out of the counts; a warning names them.

    Args:
        model: Called as `model(images, return_output=True)`: an adapter or a compatible module, on its device.
        dataset: Yields (image, label).
        batch_size: Images of a batch.
        num_workers: Processes that load images; None chooses, see `TrainSettings.num_workers`.
        distributed: Share the images among the processes, each image counted once; all processes must call it, and all
            get the result for the complete dataset. False: this process evaluates all images.
        accelerator: Provides mixed precision; None computes in the model's own dtypes.
        persistent: Keep the workers between calls, until `close`.
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
        self._size = len(dataset)  # type: ignore[arg-type]
        self._dataset, dataset = dataset, without_replacements(dataset)
        self._share = range(self._size)
        if distributed:
            processes, rank = current_replica()
            self._share = range(rank, self._size, processes)
            dataset = Subset(dataset, self._share)
        self._model, self._distributed, self._accelerator = model, distributed, accelerator
        self._loader = _loader(model, dataset, batch_size, num_workers, persistent)

    def __call__(self, metrics: ShotMetrics, recorder: PredictionRecorder | None = None) -> ShotResult:
        """Reset `metrics`, update them with all images and compute; the model's mode is restored.

        Args:
            metrics: Has the class counts of training and the shot rule.
            recorder: Its `result` is set to the predictions of all images.

        Raises:
            InputError: No image can be read.
        """
        metrics.reset()
        evaluated = 0
        report = Reporter(False, True).unreadable_images(dataset=self._dataset)  # nothing inside that of a run
        with report, closing(_outputs(self._model, self._loader, self._accelerator)) as outputs:
            for output, labels in outputs:
                metrics.update(output[0], labels)
                if recorder is not None:
                    recorder.update(output, labels)
                evaluated += len(labels)
        if self._size and not (evaluated or self._distributed):
            raise InputError(
                f"None of the {self._size} images can be read, so there is nothing to evaluate: repair them, or check "
                "the paths."
            )
        if recorder is not None:
            unreadable = getattr(self._dataset, "unreadable_images", ())
            positions = [position for position in self._share if position not in unreadable]
            recorder.gather(positions, self._size, images=image_names(self._dataset), distributed=self._distributed)
        return (metrics.sync() if self._distributed else metrics).compute()

    def close(self) -> None:
        """Stop persistent workers."""
        stop_workers(self._loader)


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    metrics: ShotMetrics,
    *,
    batch_size: int = 128,
    num_workers: int | None = None,
    distributed: bool = False,
    accelerator: Accelerator | None = None,
    recorder: PredictionRecorder | None = None,
) -> ShotResult:
    """Reset `metrics`, update them with a dataset and compute.

    Only the logits are used, and unreadable images are left out as in `Evaluation`. On an accelerator, predictions are
    copied to the host once, at the end.

    Args:
        model: As in `Evaluation`, like all following arguments.
        dataset: Yields (image, label).
        metrics: Has the class counts of training and the shot rule.
        batch_size: Images of a batch.
        num_workers: Processes that load images; None chooses.
        distributed: Share the images among the processes.
        accelerator: Provides mixed precision.
        recorder: Its `result` is set to the predictions.
    """
    evaluation = Evaluation(
        model,
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        distributed=distributed,
        accelerator=accelerator,
    )
    return evaluation(metrics, recorder)


def predict(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int = 128,
    num_workers: int | None = None,
    accelerator: Accelerator | None = None,
) -> tuple[Any, Tensor]:
    """Return outputs and labels of a dataset, in its order; the model's mode is restored.

    Every item has a row: with `unreadable="skip"`, the row of an unreadable image is that of its replacement.

    Args:
        model: Called as `model(images, return_output=True)`: an adapter or a compatible module.
        dataset: Yields (image, label).
        batch_size: Images of a batch.
        num_workers: Processes that load images; None chooses, see `TrainSettings.num_workers`.
        accelerator: Provides mixed precision; None computes in the model's own dtypes.

    Returns:
        The model's output type with every tensor on the CPU, (N, ...), and labels (N,) int64.

    Raises:
        InputError: The dataset is empty, or its images are not tensors of the same shape.
    """
    if not len(dataset):  # type: ignore[arg-type]
        raise InputError("The dataset is empty: there is nothing to predict.")
    outputs, labels = [], []
    with closing(_outputs(model, _loader(model, dataset, batch_size, num_workers), accelerator)) as found:
        for output, target in found:
            outputs.append(type(output)(*(tensor.cpu() for tensor in output)))
            labels.append(target)
    joined = (torch.cat(fields) for fields in zip(*outputs, strict=True))
    return type(outputs[0])(*joined), torch.cat(labels)


def _loader(
    model: nn.Module, dataset: Dataset[Any], batch_size: int, num_workers: int | None, persistent: bool = False
) -> DataLoader[Any]:
    workers = resolve_workers(num_workers, dataset, batch_size)
    pin = next(model.parameters()).device.type == "cuda"
    return image_loader(dataset, batch_size=batch_size, num_workers=workers, pin_memory=pin, persistent=persistent)


@torch.no_grad()
def _outputs(
    model: nn.Module, loader: DataLoader[Any], accelerator: Accelerator | None
) -> Generator[tuple[Any, Tensor], None, None]:
    """Outputs on the model's device and labels on the CPU, batch by batch."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with open_batches(loader) as batches:
            for batch in batches:
                if batch is None:  # no image of the batch can be read
                    continue
                images, labels = batch
                with nullcontext() if accelerator is None else accelerator.autocast():
                    output = model(images.to(device, non_blocking=True), return_output=True)
                yield output, labels
    finally:
        model.train(training)
