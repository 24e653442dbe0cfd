"""Map-style datasets of (image, label) as LabelledImages: those of torchvision, timm and your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.sources import ItemImages
from lpt_peft.errors import InputError
from lpt_peft.samplers.checks import Labels

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_dataset(
    dataset: Any, labels: Labels | None = None, class_names: Sequence[str] | None = None, **options: Unpack[Options]
) -> LabelledImages:
    """Wrap a map-style dataset; its own transform still applies.

    Args:
        dataset: Has `len(dataset)`, and `dataset[index]` is a tuple that starts with the image, PIL or a tensor.
        labels: Class of every image, (N,) integers; None uses the dataset's `targets` or `labels`.
        class_names: (C,); None uses the dataset's `classes` if it has them, otherwise the numbers.
        **options: Options of `LabelledImages`.

    Raises:
        InputError: The dataset is not map-style, its labels are unknown, or they are invalid for `LabelledImages`.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> images = torch.zeros(3, 3, 8, 8)
        >>> data = from_dataset(TensorDataset(images), labels=[0, 1, 1])
        >>> data.class_counts, data[2][1]
        ([1, 2], 1)
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(
            f"{type(dataset).__name__} is not map-style: it has no len() or no [index], and samplers draw images by "
            "index. Save the images as files and call image_folder or image_list."
        )
    if labels is None:
        found = [getattr(dataset, name) for name in ("targets", "labels") if hasattr(dataset, name)]
        if not found:
            raise InputError(
                f"{type(dataset).__name__} has neither `targets` nor `labels`; pass labels=, the class of every image."
            )
        labels = found[0]
    names: Any = getattr(dataset, "classes", None) if class_names is None else class_names
    if class_names is None and names is not None and not isinstance(names, (str, Mapping)):
        names = [_text(name) for name in names]
    return LabelledImages(ItemImages(dataset, 0, type(dataset).__name__), labels, names, **options)


def _text(name: Any) -> str:
    """Class name as text; torchvision's ImageNet has a tuple of synonyms for each class."""
    return ", ".join(map(str, name)) if isinstance(name, (tuple, list)) else str(name)
