"""What a run refuses before its first step, and a batch that cannot be made: labels, images and sizes.

Not here: settings (`settings.py`), and files that cannot be read (`lpt_peft.data`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from lpt_peft.errors import ConfigError, InputError
from lpt_peft.recipe.randomness import kept_random_state
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.samplers.checks import checked_labels

_TRANSFORMS = "lpt_peft.data.transforms makes them from the ViT's own data configuration"


def check_data(
    dataset: Dataset[Any],
    labels: Sequence[int],
    settings: TrainSettings,
    *,
    num_classes: int,
    num_processes: int,
    own_criterion: bool = False,
) -> list[int]:
    """The labels as plain numbers, once they fit the dataset and the head, and the batch fits the processes.

    Args:
        dataset: Has a length.
        labels: Class of every item.
        settings: Loss, batch size and accumulation count.
        num_classes: Of the head.
        num_processes: That share out a batch.
        own_criterion: The caller's criterion takes the place of the named loss.

    Raises:
        InputError: Labels are none, or not as many as items; a label is beyond the head's classes; a class has no
            image, which every named loss but cross-entropy needs; all images are of one class.
        ConfigError: The batch cannot be shared out evenly.
    """
    size = len(dataset)  # type: ignore[arg-type]
    rows = checked_labels(labels)
    if size != len(rows):
        raise InputError(f"{len(rows)} labels do not fit a dataset of {size} items; give one label for each item.")
    counts = np.bincount(rows[rows < num_classes], minlength=num_classes)
    if rows.max() >= num_classes:
        raise InputError(
            f"labels[{rows.argmax()}] is {rows.max()}, but the head has {num_classes} classes, 0 to {num_classes - 1}: "
            f"wrap(vit, num_classes={rows.max() + 1}), or leave those images out."
        )
    if np.count_nonzero(counts) == 1:
        raise InputError(
            f"All {size} images are of class {rows[0]}: there is nothing to tell apart. Give images of two classes or "
            "more."
        )
    if not (counts.all() or own_criterion or settings.loss == "cross_entropy"):
        empty = np.flatnonzero(counts == 0)
        raise InputError(
            f"{len(empty)} of {num_classes} classes have no image among the labels; the first is class {empty[0]}. "
            f'loss="{settings.loss}" needs one of each: number the classes without a gap, and wrap(vit, '
            f'num_classes={np.count_nonzero(counts)}); or take loss="cross_entropy".'
        )
    if settings.batch_size % (num_processes * settings.accumulate):
        raise ConfigError(
            f"batch_size={settings.batch_size} cannot be shared out evenly by {num_processes} processes in "
            f"accumulate={settings.accumulate} parts each; give a multiple of {num_processes * settings.accumulate}."
        )
    plain: list[int] = rows.tolist()
    return plain


@torch.no_grad()
def check_image(model: nn.Module, dataset: Dataset[Any], labels: Sequence[int], accelerator: Accelerator) -> None:
    """The first item is an image that the model takes, and has the first label.

    Raises:
        InputError: It is not.
    """
    with kept_random_state():
        item = dataset[0]
    image, label = collate([item])
    if label.numel() == 1 and int(label) != int(labels[0]):
        raise InputError(
            f"dataset[0] says that it is of class {int(label)}, and labels[0] says {int(labels[0])}: they are not of "
            "the same images, or not in the same order."
        )
    mode = model.training
    try:
        with accelerator.autocast():
            model.eval()(image.to(accelerator.device), return_output=True)
    except torch.OutOfMemoryError:
        raise  # not the image's fault
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"The model does not take dataset[0], an image of shape {tuple(image.shape[1:])} and {image.dtype}: "
            f"{str(error)[:300]} Transform the images to its size: {_TRANSFORMS}; or build the ViT for theirs."
        ) from error
    finally:
        model.train(mode)


def collate(items: list[Any]) -> tuple[Tensor, Tensor]:
    """One batch (B, C, H, W) of images and their labels (B,).

    Raises:
        InputError: Images are no tensors, or not of the same shape.
    """
    if not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
        raise InputError("Items of the dataset must be pairs (image, label).")
    images = [image for image, _ in items]
    if others := {type(image).__name__ for image in images if not isinstance(image, (Tensor, np.ndarray))}:
        raise InputError(
            f"Images of the dataset are {', '.join(sorted(others))}, no tensors: give it a transform; {_TRANSFORMS}."
        )
    if len(shapes := sorted({tuple(image.shape) for image in images})) > 1:
        raise InputError(
            f"Images of one batch have the shapes {', '.join(map(str, shapes[:4]))}: transform them to one size; "
            f"{_TRANSFORMS}."
        )
    batch, labels = default_collate(items)
    return batch, labels
