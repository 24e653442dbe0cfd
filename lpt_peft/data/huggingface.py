"""Hugging Face `datasets` objects as LabelledImages; columns are found by their features.

Not here: loading them; call `datasets.load_dataset` (`lpt_peft[hf]`).
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
    """Wrap a split; its `set_format` and `set_transform` are ignored.

    Args:
        dataset: A `datasets.Dataset`, not a dictionary of splits and not streaming.
        image_column: None uses the only column with the feature `Image`.
        label_column: None uses the only column with the feature `ClassLabel`, which also has the class names. A column
            of integers may be given instead; its class names are the numbers.
        **options: Options of `LabelledImages`.

    Raises:
        InputError: The object is not a single map-style split, a column is missing, ambiguous or of another kind, or
            the labels are invalid for `LabelledImages`; -1 marks images without a label.
    """
    if isinstance(dataset, dict):
        raise InputError(f'This is a dictionary of splits, {sorted(dataset)}; pass a single split: dataset["train"].')
    if not (hasattr(dataset, "features") and hasattr(dataset, "__len__") and hasattr(dataset, "select_columns")):
        raise InputError(
            f"{type(dataset).__name__} is not a map-style datasets.Dataset; load it with streaming=False, or call "
            "from_dataset."
        )
    image_column = _column(dataset, image_column, "Image", "image_column")
    label_column = _column(dataset, label_column, "ClassLabel", "label_column")
    rows = dataset.with_format(None)
    labels = rows[label_column][:]
    if any(label is None or isinstance(label, str) for label in labels):
        raise InputError(
            f"Column {label_column!r} does not have an integer for every image; number its classes by "
            f"dataset.class_encode_column({label_column!r}), and remove images without a label."
        )
    names = getattr(dataset.features[label_column], "names", None)
    images = ItemImages(rows.select_columns([image_column]), image_column, f"column {image_column!r}")
    return LabelledImages(images, labels, names, **options)


def _column(dataset: Any, name: str | None, feature: str, argument: str) -> str:
    """Return the given column, or the only column with this feature."""
    if name is not None:
        if name not in dataset.features:
            raise InputError(f"{argument}={name!r} is not a column; the columns are {list(dataset.features)}.")
        return name
    # Compared by name, so that `datasets` is not imported here.
    found: list[str] = [column for column, kind in dataset.features.items() if type(kind).__name__ == feature]
    if len(found) != 1:
        raise InputError(
            f"{len(found)} columns have the feature {feature}, of {list(dataset.features)}; choose with {argument}=..."
        )
    return found[0]
