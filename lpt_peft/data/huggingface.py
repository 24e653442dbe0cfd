"""Hugging Face `datasets` objects as LabelledImages: images, labels and class names found by their features.

Not here: loading them; `datasets.load_dataset` does that. Nothing is imported from `datasets`: who has such an object
has the library (`lpt_peft[hf]`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.sources import ItemImages
from lpt_peft.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_huggingface(
    dataset: Any, image_column: str | None = None, label_column: str | None = None, **options: Unpack[Options]
) -> LabelledImages:
    """Images and labels of one split; its set_format and set_transform are left aside.

    Args:
        dataset: A `datasets.Dataset`, not a dictionary of splits and not streaming.
        image_column: None takes the only column of feature `Image`.
        label_column: None takes the only column of feature `ClassLabel`, which also gives the class names. A column of
            whole numbers may be named instead; its classes are called by their numbers.
        **options: transform, unreadable, verify and allow_empty of `LabelledImages`.

    Raises:
        InputError: The object is no single map-style split, a column is missing, of another kind or one of several, or
            the labels break a rule of `LabelledImages`; -1 marks images without a label there.
    """
    if isinstance(dataset, dict):
        raise InputError(f'This is a dictionary of splits, {sorted(dataset)}; pass one of them: dataset["train"].')
    if not (hasattr(dataset, "features") and hasattr(dataset, "__len__") and hasattr(dataset, "select_columns")):
        raise InputError(
            f"{type(dataset).__name__} is no map-style datasets.Dataset; load it with streaming=False, or call "
            "from_dataset."
        )
    image_column = _column(dataset, image_column, "Image", "image_column")
    label_column = _column(dataset, label_column, "ClassLabel", "label_column")
    rows = dataset.with_format(None)
    labels = rows[label_column][:]
    if any(label is None or isinstance(label, str) for label in labels):
        raise InputError(
            f"Column {label_column!r} does not hold a whole number for every image; number its classes by "
            f"dataset.class_encode_column({label_column!r}), and filter out what has no label."
        )
    names = getattr(dataset.features[label_column], "names", None)
    images = ItemImages(rows.select_columns([image_column]), image_column, f"column {image_column!r}")
    return LabelledImages(images, labels, names, **options)


def _column(dataset: Any, name: str | None, feature: str, argument: str) -> str:
    """The column asked for, or the only one with this feature."""
    if name is not None:
        if name not in dataset.features:
            raise InputError(f"{argument}={name!r} is no column; there are {list(dataset.features)}.")
        return name
    # By name: to import the library only for its classes would make it a need.
    found: list[str] = [column for column, kind in dataset.features.items() if type(kind).__name__ == feature]
    if len(found) != 1:
        raise InputError(
            f"{len(found)} columns have the feature {feature}, of {list(dataset.features)}; say which: {argument}=..."
        )
    return found[0]
