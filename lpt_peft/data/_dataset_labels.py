"""Labels and class names that map-style datasets of other libraries list.

Labels are read from attributes, without reading images, and compared with the labels of a sample of items.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from lpt_peft._classes import names_in_order
from lpt_peft._random import preserve_random_state
from lpt_peft.data.checks import distinct_names
from lpt_peft.errors import InputError

_OFFICIAL = ("targets", "labels")
_PRIVATE = ("_labels", "_targets", "y")
_PAIRS = ("samples", "imgs", "_samples")
_SAMPLE, _LARGE_SAMPLE, _CHEAP_SECONDS = 8, 256, 0.05


@dataclass(frozen=True)
class ListedLabels:
    """Labels that a dataset lists.

    Attributes:
        labels: (N,) as listed, after the target transform.
        names: (C,) class names, or None.
        source: Attribute of the labels, for messages.
    """

    labels: Sequence[Any]
    names: list[str] | None
    source: str


def listed_labels(dataset: Any) -> ListedLabels | None:
    """Find the labels of a dataset, and its class names.

    Supported are the datasets of torchvision and timm, `TensorDataset`, lists of (image, label), and subsets,
    concatenations and other wrappers of them. A `target_transform` is applied.

    Raises:
        InputError: Concatenated datasets have different classes.
    """
    if isinstance(dataset, (list, tuple)):
        pairs = all(isinstance(item, (list, tuple)) and len(item) > 1 for item in dataset)
        if pairs and any(_is_array(item[1]) and integer_label(item[1]) is None for item in dataset):
            return None  # images, or labels of another shape
        return ListedLabels([item[1] for item in dataset], None, "its items") if dataset and pairs else None
    if hasattr(dataset, "datasets") and hasattr(dataset, "cumulative_sizes"):
        return _concatenated(dataset.datasets)
    own = _own_labels(dataset)
    if own is None and hasattr(dataset, "dataset"):
        inner = listed_labels(dataset.dataset)
        indices = getattr(dataset, "indices", None)
        if inner is not None and indices is not None:
            rows = [inner.labels[int(index)] for index in indices]
            return ListedLabels(rows, inner.names, f"dataset.{inner.source}")
        if inner is not None and len(inner.labels) == len(dataset):
            own = ListedLabels(inner.labels, inner.names, f"dataset.{inner.source}")
    return own if own is None else _transformed(own, getattr(dataset, "target_transform", None))


def compare_with_items(dataset: Any, labels: Sequence[Any], image_key: int | str) -> list[tuple[int, int]]:
    """Read a sample of items and return the positions and labels of those whose label differs from `labels`.

    Eight items are read, or 256 where reading is quick. The random state of torch, numpy and Python is kept. Items that
    cannot be read or have no integer label are passed over.
    """
    size, different = len(dataset), []
    with preserve_random_state():
        positions = _spread(size, _SAMPLE)
        start = time.perf_counter()
        for count, position in enumerate(positions):
            found = _label_of_item(dataset, position, image_key)
            if found is not None and found != labels[position]:
                different.append((position, found))
            if count == _SAMPLE - 1 and time.perf_counter() - start < _CHEAP_SECONDS:
                positions += _spread(size, _LARGE_SAMPLE)
    return sorted(set(different))


def _own_labels(dataset: Any) -> ListedLabels | None:
    names = _names(dataset)
    for attribute in (*_OFFICIAL, *_PRIVATE):
        labels = _plain(getattr(dataset, attribute, None), len(dataset))
        if labels is not None:
            return ListedLabels(labels, names, attribute)
    reader = getattr(dataset, "reader", None) or getattr(dataset, "parser", None)  # timm
    for holder, prefix in ((dataset, ""), (reader, "reader.")):
        for attribute in _PAIRS:
            pairs = getattr(holder, attribute, None)
            if isinstance(pairs, (list, tuple)) and len(pairs) == len(dataset) and _are_pairs(pairs):
                labels = [pair[1] for pair in pairs]
                return ListedLabels(labels, names or _names(reader), f"{prefix}{attribute}")
    tensors: Any = getattr(dataset, "tensors", ())  # TensorDataset
    if len(tensors) > 1 and (labels := _plain(tensors[1], len(dataset))) is not None:
        return ListedLabels(labels, names, "tensors[1]")
    return None


def _are_pairs(rows: Sequence[Any]) -> bool:
    return all(isinstance(row, (list, tuple)) and len(row) == 2 and integer_label(row[1]) is not None for row in rows)


def _plain(values: Any, size: int) -> list[Any] | None:
    """Values as a list if they may be labels of `size` images."""
    if isinstance(values, (torch.Tensor, np.ndarray)):
        return values.tolist() if values.ndim == 1 and len(values) == size else None
    if isinstance(values, Sequence) and not isinstance(values, str) and len(values) == size:
        return [value if (label := integer_label(value)) is None else label for value in values]
    return None


def _concatenated(datasets: Sequence[Any]) -> ListedLabels | None:
    listed = [listed_labels(dataset) for dataset in datasets]
    found = [labels for labels in listed if labels is not None]
    if len(found) < len(listed):
        return None
    if any(labels.names != found[0].names for labels in found):
        first, other = next((found[0].names, labels.names) for labels in found if labels.names != found[0].names)
        raise InputError(
            f"The concatenated datasets have different classes, so their labels do not agree: {(first or [])[:5]} and "
            f"{(other or [])[:5]}. Give both the same classes, or pass labels= and class_names=."
        )
    return ListedLabels([label for labels in found for label in labels.labels], found[0].names, "datasets")


def _names(dataset: Any) -> list[str] | None:
    """Class names in label order; equal names get their label, so that they stay different classes."""
    classes = getattr(dataset, "class_to_idx", None)
    if isinstance(classes, Mapping) and sorted(classes.values()) == list(range(len(classes))):
        names: list[Any] = sorted(classes, key=classes.__getitem__)
        listed = getattr(dataset, "classes", None)
        if isinstance(listed, Sequence) and len(listed) == len(names):
            names = list(listed) if set(names) != set(map(str, listed)) else names
    else:
        classes = getattr(dataset, "classes", None) or getattr(dataset, "class_names", None)
        if isinstance(classes, Mapping):
            return list(names_in_order(classes, "classes", unique=False))
        if not isinstance(classes, Sequence) or isinstance(classes, str):
            return None
        names = list(classes)
    # ImageNet of torchvision lists tuples of synonyms, and two classes named "crane".
    return distinct_names([", ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in names])


def _transformed(listed: ListedLabels, transform: Any) -> ListedLabels:
    """Apply a target transform to labels, and to class names if it numbers the classes in another order."""
    if transform is None:
        return listed
    new_of = {label: transform(label) for label in dict.fromkeys(listed.labels)}
    labels = [new_of[label] for label in listed.labels]
    names = listed.names
    if names is not None:
        order = [integer_label(new_of.get(label, transform(label))) for label in range(len(names))]
        if sorted(label for label in order if label is not None) == list(range(len(names))):
            renamed = list(names)
            for name, label in zip(names, order, strict=True):
                renamed[label or 0] = name
            names = renamed
        else:
            names = None  # classes are merged or left out: their names are unknown
    return ListedLabels(labels, names, f"{listed.source} after target_transform")


def _label_of_item(dataset: Any, position: int, image_key: int | str) -> int | None:
    try:
        item = dataset[position]
    except Exception:  # an unreadable image is an error where it is used
        return None
    if image_key == 0 and isinstance(item, (list, tuple)) and len(item) > 1:
        return integer_label(item[1])
    return None


def integer_label(value: Any) -> int | None:
    """The value as an integer; None if it is no integer, NumPy integer or tensor of shape ()."""
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    return int(value) if isinstance(value, (int, np.integer)) and not isinstance(value, bool) else None


def _is_array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray, Image.Image))


def _spread(size: int, count: int) -> list[int]:
    """Positions spread evenly, with the first and the last."""
    return sorted({round(step * (size - 1) / max(count - 1, 1)) for step in range(count)}) if size else []
