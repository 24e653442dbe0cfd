"""Readable images of a validation or test split: an unreadable image is left out instead of replaced.

Not here: the replacement of unreadable training images (`lpt_peft.data.images`).
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from lpt_peft.data.images import LabelledImages
from lpt_peft.errors import InputError


class ReadableImages(Dataset[Any]):
    """Items of a data set, and None for each image that cannot be read.

    A replacement would be counted twice, and the accuracy weighted by it.

    Args:
        dataset: Images with the policy `unreadable="skip"`; with "error", reading raises as before.
    """

    def __init__(self, dataset: LabelledImages) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, int] | None:
        found = self._dataset.unreadable_images
        if index in found:
            return None
        try:
            item = self._dataset[index]
        except InputError:
            if index in found:  # and no image of its class can be read
                return None
            raise
        return None if index in found else item


def without_replacements(dataset: Dataset[Any]) -> Dataset[Any]:
    """Return the data set as an evaluation reads it; data sets that replace nothing are returned unchanged."""
    return ReadableImages(dataset) if isinstance(dataset, LabelledImages) else dataset


def first_readable(dataset: Dataset[Any], name: str = "dataset") -> tuple[int, Any]:
    """Index and item of the first image that can be read.

    Args:
        dataset: Not empty.
        name: Of the dataset in messages.

    Raises:
        InputError: No image can be read.
    """
    size = len(dataset)  # type: ignore[arg-type]
    for index in range(size):
        if (item := dataset[index]) is not None:
            return index, item
    raise InputError(f"None of the {size} images of {name} can be read: repair them, or check the paths.")
