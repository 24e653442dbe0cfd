"""Predictions and shot metrics of a trained model on a map-style dataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lpt_peft._numbers import checked_integer
from lpt_peft._numerics import at_least_float32
from lpt_peft.data.workers import open_batches, stop_workers
from lpt_peft.errors import InputError
from lpt_peft.losses import adjust_logits
from lpt_peft.metrics import ShotMetrics, ShotResult
from lpt_peft.recipe.loading.loader import image_loader, resolve_workers
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
        crops: Crops of each image. For more than 1, the dataset yields images (crops, C, H, W), as
            `lpt_peft.data.transforms.transforms(..., crops=5)` makes them, and the logits are the mean of log p over
            the crops (test-time ensemble of LIFT, Shi et al., ICML 2024). Groups are those of the first crop.
        post_hoc_tau: Post-hoc logit adjustment with the class counts of the metrics, for a model trained with
            cross-entropy: `logits - tau * log pi`, see `lpt_peft.losses.adjust_logits`; 0: off.
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
        crops: int = 1,
        post_hoc_tau: float = 0.0,
    ) -> None:
        self._size = len(dataset)  # type: ignore[arg-type]
        self._dataset, dataset = dataset, without_replacements(dataset)
        self._share = range(self._size)
        if distributed:
            processes, rank = current_replica()
            self._share = range(rank, self._size, processes)
            dataset = Subset(dataset, self._share)
        self._model, self._distributed, self._accelerator = model, distributed, accelerator
        self._crops, self._tau = checked_integer("crops", crops, 1), post_hoc_tau
        self._loader = evaluation_loader(model, dataset, batch_size, num_workers, persistent)

    def __call__(self, metrics: ShotMetrics, recorder: PredictionRecorder | None = None) -> ShotResult:
        """Reset `metrics`, update them with all images and compute; the model's mode is restored.

        Args:
            metrics: Has the class counts of training and the shot rule.
            recorder: Its `result` is set to the predictions of all images.

        Returns:
            The result; its `rule` names crops and adjustment.

        Raises:
            InputError: No image can be read, the images are not `crops` crops each, or a class that the logits are
                adjusted for has no training image.
            ConfigError: `post_hoc_tau` is out of range.
        """
        metrics.reset()
        evaluated = 0
        report = Reporter(False, True).unreadable_images(dataset=self._dataset)  # nothing inside that of a run
        with report, evaluation_batches(self._model, self._loader, self._accelerator) as batches:
            for images, labels in batches:
                output = self._output(images)
                if self._tau:
                    logits = adjust_logits(output[0], metrics.class_counts, tau=self._tau)
                    output = type(output)(logits, *output[1:])
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
        result = (metrics.sync() if self._distributed else metrics).compute()
        notes = [f"mean of log p over {self._crops} crops"] if self._crops > 1 else []
        notes += [f"post-hoc logit adjustment, tau {self._tau:g}"] if self._tau else []
        return replace(result, rule="; ".join([result.rule, *notes]))

    def _output(self, images: Tensor) -> Any:
        """Output for a batch (B, C, H, W), or for crops (B, crops, C, H, W)."""
        if self._crops == 1:
            return self._model(images, return_output=True)
        return _mean_output([self._model(view, return_output=True) for view in _views(images, self._crops)])

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
    crops: int = 1,
    post_hoc_tau: float = 0.0,
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
        crops: Crops of each image, of which log p is averaged.
        post_hoc_tau: Strength of the logit adjustment after training.
    """
    evaluation = Evaluation(
        model,
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        distributed=distributed,
        accelerator=accelerator,
        crops=crops,
        post_hoc_tau=post_hoc_tau,
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
    loader = evaluation_loader(model, dataset, batch_size, num_workers)
    with evaluation_batches(model, loader, accelerator) as batches:
        for images, target in batches:
            output = model(images, return_output=True)
            outputs.append(type(output)(*(tensor.cpu() for tensor in output)))
            labels.append(target)
    joined = (torch.cat(fields) for fields in zip(*outputs, strict=True))
    return type(outputs[0])(*joined), torch.cat(labels)


def evaluation_loader(
    model: nn.Module, dataset: Dataset[Any], batch_size: int, num_workers: int | None, persistent: bool = False
) -> DataLoader[Any]:
    """Build the loader of a pass over (image, label) items in their order, see `image_loader`."""
    workers = resolve_workers(num_workers, dataset, batch_size)
    pin = next(model.parameters()).device.type == "cuda"
    return image_loader(dataset, batch_size=batch_size, num_workers=workers, pin_memory=pin, persistent=persistent)


@contextmanager
def evaluation_batches(
    model: nn.Module, loader: DataLoader[Any], accelerator: Accelerator | None
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Yield the batches of a pass without gradients, with the model in eval mode and in the precision of a run.

    Batches of which no image can be read are left out.

    Args:
        model: Its mode is restored afterwards.
        loader: Of `evaluation_loader`.
        accelerator: Provides mixed precision; None computes in the model's own dtypes.

    Returns:
        Context of an iterator over images on the model's device and labels on the CPU.
    """
    device, training = next(model.parameters()).device, model.training
    precision = nullcontext() if accelerator is None else accelerator.autocast()
    model.eval()
    try:
        with open_batches(loader) as batches, torch.no_grad(), precision:
            yield ((batch[0].to(device, non_blocking=True), batch[1]) for batch in batches if batch is not None)
    finally:
        model.train(training)


def _views(images: Tensor, crops: int) -> tuple[Tensor, ...]:
    """The crops of a batch (B, crops, C, H, W), each (B, C, H, W)."""
    if images.ndim != 5 or images.shape[1] != crops:
        raise InputError(
            f"crops={crops} needs images of shape ({crops}, C, H, W), not {tuple(images.shape[1:])}: give the dataset "
            f"lpt_peft.data.transforms.transforms(adapter.preprocess(), train=False, crops={crops})."
        )
    return images.unbind(1)


def _mean_output(outputs: list[Any]) -> Any:
    """The output of the first crop, with the mean of log p over all crops as logits (B, C)."""
    log_p = torch.stack([at_least_float32(output[0]).log_softmax(-1) for output in outputs])
    return type(outputs[0])(log_p.mean(0), *outputs[0][1:])
