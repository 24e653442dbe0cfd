"""Map-style datasets of (image, label) as LabelledImages: those of torchvision, timm and your own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lpt_peft.data._dataset_labels import ListedLabels, compare_with_items, listed_labels
from lpt_peft.data._label_advice import READ_ALL, advice_without_labels
from lpt_peft.data.checks import ClassNames
from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.sources import ItemImages
from lpt_peft.errors import InputError
from lpt_peft.samplers.checks import Labels, checked_labels

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_dataset(
    dataset: Any,
    labels: Labels | None = None,
    class_names: ClassNames | None = None,
    *,
    image_key: int | str = 0,
    **options: Unpack[Options],
) -> LabelledImages:
    """Wrap a map-style dataset; its own transforms still apply.

    Labels that the dataset lists are compared with those of a few items; a `target_transform` is applied to them. Given
    labels may differ from those of the items, for example to merge classes; the summary then has a note.

    Args:
        dataset: Has `len(dataset)`, and `dataset[index]` is a tuple that starts with the image: a PIL image, a tensor,
            a path or the bytes of a file.
        labels: Class of every image, (N,) integers; None uses those that the dataset lists, as in the datasets of
            torchvision and timm, `TensorDataset`, a list of (image, label), `Subset` and `ConcatDataset`.
        class_names: (C,); None uses the `classes` that the dataset lists, otherwise the numbers.
        image_key: Position of the image in an item, or its key where items are dictionaries.
        **options: Options of `LabelledImages`.

    Raises:
        InputError: The dataset is empty or not map-style, its labels are unknown, differ from those of its items, or
            are invalid for `LabelledImages`.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> images = torch.zeros(3, 3, 8, 8)
        >>> data = from_dataset(TensorDataset(images), labels=[0, 1, 1])
        >>> data.class_counts, data[2][1]
        ([1, 2], 1)
    """
    kind = type(dataset).__name__
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(
            f"{kind} is not map-style: it has no len() or no [index], and samplers draw images by index. Save the "
            "images as files and call image_folder or image_list."
        )
    if hasattr(dataset, "features") and hasattr(dataset, "column_names"):
        raise InputError("This is a data set of Hugging Face datasets; call from_huggingface.")
    if not len(dataset):
        raise InputError(f"{kind} is empty: it has no image.")
    listed = listed_labels(dataset)
    notes: list[str] = []
    if labels is None:
        labels = _verified(dataset, listed, image_key)
    else:
        rows = checked_labels(labels)
        if len(rows) == len(dataset) and (different := compare_with_items(dataset, rows.tolist(), image_key)):
            position, label = different[0]
            notes.append(
                f"the given labels differ from those of the items, for example item {position}: {rows[position]} "
                f"given, {label} in the item"
            )
    if class_names is None and listed is not None and not notes:
        class_names = listed.names
    return LabelledImages(ItemImages(dataset, image_key, kind), labels, class_names, notes=notes, **options)


def _verified(dataset: Any, listed: ListedLabels | None, image_key: int | str) -> Sequence[int]:
    """Return the listed labels if they agree with a sample of items."""
    kind = type(dataset).__name__
    if listed is None:
        raise InputError(f"{kind} lists no labels: {advice_without_labels(dataset)}.")
    different = compare_with_items(dataset, listed.labels, image_key)
    if different:
        position, label = different[0]
        raise InputError(
            f"{kind} lists label {listed.labels[position]} for item {position} in `{listed.source}`, but the item has "
            f"label {label}. Pass labels=, {READ_ALL}."
        )
    return listed.labels
