"""Checks of settings, labels and images before the first step; collation of batches.

Not here: settings (`settings.py`) and files that cannot be read (`lpt_peft.data`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from lpt_peft._random import preserve_random_state
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.data.images import LabelledImages
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.recipe.loading.readable import first_readable, without_replacements
from lpt_peft.recipe.parallel import broadcast_module, check_accelerator, check_precision
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.samplers.checks import checked_labels
from lpt_peft.vit_classifier import ViTClassifier

_TRANSFORMS = "lpt_peft.data.transforms builds them from the ViT's own data configuration"


def prepare(
    model: nn.Module,
    dataset: Dataset[Any],
    labels: Sequence[int],
    settings: TrainSettings,
    *,
    criterion: Any,
    accelerator: Accelerator,
) -> list[int]:
    """Run all checks, move the model to its device and make it equal on all processes.

    Args:
        model: Has a head with a weight (C, d).
        dataset: Training images.
        labels: Class of every image.
        settings: Training settings.
        criterion: The caller's criterion, if any.
        accelerator: Device and processes.

    Returns:
        The labels as plain integers.

    Raises:
        LPTError: As the checks of this module and of `parallel.py`.
    """
    check_accelerator(accelerator)
    check_precision(settings, accelerator)
    head: Any = model.get_submodule("head")
    plain = check_data(
        dataset,
        labels,
        settings,
        num_classes=len(head.weight),
        num_processes=accelerator.num_processes,
        custom_criterion=criterion is not None,
    )
    if settings.backbone_dtype != "float32":
        if not isinstance(model, (LongTailPromptAdapter, ViTClassifier)):
            raise ConfigError(
                f"backbone_dtype={settings.backbone_dtype!r} casts the frozen ViT of an adapter or a linear probe, "
                f'and a {type(model).__name__} has none: use "float32", and cast the model yourself.'
            )
        model.cast_backbone(getattr(torch, settings.backbone_dtype))
    model.to(accelerator.device)
    broadcast_module(model)
    check_image(model, dataset, plain, accelerator)
    return plain


def check_data(
    dataset: Dataset[Any],
    labels: Sequence[int],
    settings: TrainSettings,
    *,
    num_classes: int,
    num_processes: int,
    custom_criterion: bool = False,
) -> list[int]:
    """Check that labels fit the dataset and the head, and that batches divide evenly among processes.

    Args:
        dataset: Has a length.
        labels: Class of every item.
        settings: Loss, batch size and accumulation.
        num_classes: Of the head.
        num_processes: Processes that share a batch.
        custom_criterion: The caller's criterion replaces the named loss.

    Returns:
        The labels as plain integers.

    Raises:
        InputError: Labels are invalid or do not match the dataset in number; a label is outside the head's classes; a
            class has no image, which every loss that depends on class counts needs; all images have the same class.
        ConfigError: The batch cannot be divided evenly.
    """
    size = len(dataset)  # type: ignore[arg-type]
    rows = checked_labels(labels)
    if size != len(rows):
        raise InputError(f"{len(rows)} labels do not fit a dataset of {size} items; give a label for each item.")
    if isinstance(dataset, LabelledImages) and (differing := np.flatnonzero(rows != np.asarray(dataset.labels))).size:
        index = differing[0]
        raise InputError(
            f"labels[{index}] is {rows[index]}, but dataset.labels[{index}] is {dataset.labels[index]}: pass "
            "labels=dataset.labels."
        )
    counts = np.bincount(rows[rows < num_classes], minlength=num_classes)
    if rows.max() >= num_classes:
        raise InputError(
            f"labels[{rows.argmax()}] is {rows.max()}, but the head has {num_classes} classes, 0 to {num_classes - 1}: "
            f"wrap(vit, num_classes={rows.max() + 1}), or leave those images out."
        )
    if np.count_nonzero(counts) == 1:
        raise InputError(
            f"All {size} images have class {rows[0]}, so there is nothing to classify. Give images of at least two "
            "classes."
        )
    if not (counts.all() or custom_criterion or _accepts_empty_classes(settings)):
        empty = np.flatnonzero(counts == 0)
        raise InputError(
            f"{len(empty)} of {num_classes} classes have no image among the labels; the first is class {empty[0]}. "
            f'loss="{settings.loss}" needs images of every class: number the classes without gaps, and wrap(vit, '
            f'num_classes={np.count_nonzero(counts)}); or use loss="cross_entropy" or "focal" without reweight_from.'
        )
    unit = 2 * num_processes * settings.accumulate
    if settings.batch_size % unit:
        raise ConfigError(
            f"batch_size={settings.batch_size} cannot be divided evenly: two halves, {num_processes} processes, "
            f"accumulate={settings.accumulate}. Give a multiple of {unit}."
        )
    plain: list[int] = rows.tolist()
    return plain


def _accepts_empty_classes(settings: TrainSettings) -> bool:
    """Whether the loss does not depend on class counts."""
    return settings.loss in ("cross_entropy", "focal") and settings.reweight_from is None


def check_evaluation_split(model: nn.Module, dataset: Dataset[Any], name: str, accelerator: Accelerator) -> None:
    """Check before training that a split can be evaluated after it.

    Args:
        model: On the accelerator's device.
        dataset: Yields (image, label); its `labels`, if any, are checked.
        name: Of the split.
        accelerator: Device and precision.

    Raises:
        InputError: The split is empty, a label is outside the head's classes, or the model rejects the first image.
    """
    if not len(dataset):  # type: ignore[arg-type]
        raise InputError(f"The {name} split has no images: leave it out, or give it images.")
    head: Any = model.get_submodule("head")
    labels, num_classes = getattr(dataset, "labels", None), len(head.weight)
    if labels is not None and (rows := checked_labels(labels)).max() >= num_classes:
        raise InputError(
            f"Label {rows.max()} of the {name} split is outside the head's {num_classes} classes, 0 to "
            f"{num_classes - 1}: the split must have the classes of the training images, in the same order."
        )
    check_image(model, without_replacements(dataset), labels, accelerator, f"The {name} split: dataset")


@torch.no_grad()
def check_image(
    model: nn.Module,
    dataset: Dataset[Any],
    labels: Sequence[int] | None,
    accelerator: Accelerator,
    name: str = "dataset",
) -> None:
    """Check that the model accepts the first item's image, and that its label matches `labels`.

    Args:
        model: On the accelerator's device.
        dataset: Yields (image, label).
        labels: Class of every item, if known.
        accelerator: Device and precision.
        name: Of the dataset in messages.

    Raises:
        InputError: It does not.
    """
    with preserve_random_state():
        index, item = first_readable(dataset, name)
    image, label = collate([item])
    if labels is not None and label.numel() == 1 and int(label) != int(labels[index]):
        raise InputError(
            f"{name}[{index}] has class {int(label)}, but labels[{index}] is {int(labels[index])}: they do not belong "
            "to the same images, or their order differs."
        )
    training = model.training
    try:
        with accelerator.autocast():
            model.eval()(image.to(accelerator.device), return_output=True)
    except torch.OutOfMemoryError:
        raise  # not caused by the image
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"The model rejects {name}[{index}], an image of shape {tuple(image.shape[1:])} and {image.dtype}: "
            f"{str(error)[:300]} Transform the images to the model's size: {_TRANSFORMS}; or build the ViT for theirs."
        ) from error
    finally:
        model.train(training)


def collate(items: list[Any]) -> tuple[Tensor, Tensor]:
    """Stack (image, label) pairs into images (B, C, H, W) and labels (B,).

    Raises:
        InputError: Images are not tensors, or differ in shape.
    """
    if not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
        raise InputError("Items of the dataset must be pairs (image, label).")
    images = [image for image, _ in items]
    if kinds := {type(image).__name__ for image in images if not isinstance(image, (Tensor, np.ndarray))}:
        raise InputError(
            f"Images of the dataset are {', '.join(sorted(kinds))}, not tensors: give it a transform; {_TRANSFORMS}."
        )
    if len(shapes := sorted({tuple(image.shape) for image in images})) > 1:
        raise InputError(
            f"Images of a batch differ in shape: {', '.join(map(str, shapes[:4]))}. Transform them to a common size; "
            f"{_TRANSFORMS}."
        )
    batch, labels = default_collate(items)
    return batch, labels
