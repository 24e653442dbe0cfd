"""Advice for map-style datasets that list no labels, from their first item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lpt_peft.data._dataset_labels import integer_label

READ_ALL = "for example [dataset[i][1] for i in range(len(dataset))], which reads every item"


def advice_without_labels(dataset: Any) -> str:
    """Describe why a dataset lists no labels, and how `from_dataset` can be called.

    Example:
        >>> advice_without_labels([{"image": "1.png", "label": 0}])
        "its items have the keys 'image', 'label'. Pass labels=[dataset[i]['label'] for i in range(len(dataset))] and
        image_key='image'"
    """
    tensors: Any = getattr(dataset, "tensors", ())
    if len(tensors) > 1:
        advice = _flat("dataset.tensors[1]", tensors[1])
        return f"tensors[1] has the shape {tuple(tensors[1].shape)} instead of ({len(dataset)},). {advice}"
    try:
        item = dataset[0]
    except Exception:  # an unreadable image is an error where it is used
        return f"it has no `targets`, `labels` or `samples`. Pass labels=, {READ_ALL}"
    if isinstance(item, dict):
        return _for_keys(item)
    if isinstance(item, (tuple, list)) and len(item) > 1:
        return _for_pair(item)
    return f"its items are of type {type(item).__name__}, without a label. Pass labels=, the class of every image"


def _for_pair(item: Sequence[Any]) -> str:
    if integer_label(item[0]) is not None and integer_label(item[1]) is None:
        return f"the label comes first in its items. Pass labels={_comprehension('dataset[i][0]')} and image_key=1"
    if isinstance(item[1], (torch.Tensor, np.ndarray)) and item[1].ndim:
        shape = tuple(item[1].shape)
        method = "item()" if shape == (1,) else "argmax()"
        value = f"int(dataset[i][1].{method})"
        return f"the labels of its items have the shape {shape}. Pass labels={_comprehension(value)}"
    return f"it has no `targets`, `labels` or `samples`. Pass labels=, the class of every image, {READ_ALL}"


def _for_keys(item: dict[Any, Any]) -> str:
    labels = [key for key, value in item.items() if integer_label(value) is not None]
    images = [key for key in item if key not in labels]
    likely = [key for key in labels if str(key).lower() in ("label", "labels", "class", "target", "y")]
    label = (likely or labels or ["label"])[0]
    image = next((key for key in images if "im" in str(key).lower() or "pixel" in str(key).lower()), "image")
    keys = ", ".join(map(repr, item))
    call = _comprehension(f"dataset[i][{label!r}]")
    return f"its items have the keys {keys}. Pass labels={call} and image_key={image!r}"


def _flat(name: str, values: Any) -> str:
    """Advice for labels (N, 1) or one-hot labels (N, C)."""
    if values.ndim == 2:
        return f"Pass labels={name}.{'flatten()' if values.shape[1] == 1 else 'argmax(1)'}.tolist()"
    return "Pass labels=, the class of every image"


def _comprehension(value: str) -> str:
    return f"[{value} for i in range(len(dataset))]"
