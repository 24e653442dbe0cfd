"""Class counts and class names in the order of the labels.

A value per class often comes as a mapping: `Counter(labels)`, `labels.value_counts()` of pandas, `id2label` of
transformers or `class_to_idx` of torchvision. Read as a sequence, a mapping gives its keys, and its values are in the
order of insertion or of frequency. The functions here sort mappings by label and reject everything without an order.
"""

from __future__ import annotations

import operator
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Set, ValuesView
from typing import Any

from torch import Tensor

from lpt_peft.errors import InputError

_MAX_LISTED = 5  # labels in a message


def counts_in_order(counts: Any, name: str = "class_counts", label_names: Iterable[str] | None = None) -> Any:
    """Sort a mapping or pandas Series of counts by label; return sequences, arrays and tensors unchanged.

    Args:
        counts: Count of each class. A mapping has the labels 0 to `C - 1` as keys, integers or strings of integers, or
            the names in `label_names`.
        name: Name of the argument in messages.
        label_names: (C,) class names in label order, for mappings with names as keys.

    Returns:
        A list of C counts for a mapping or Series, otherwise `counts` itself. The values are not checked.

    Raises:
        InputError: A mapping does not have a key for each label, or `counts` has no order: a set, an iterator, the
            `values()` of a dictionary.

    Example:
        >>> from collections import Counter
        >>> counts_in_order(Counter([1, 0, 1, 2, 1]))
        [1, 3, 1]
        >>> counts_in_order({"cat": 7, "dog": 9}, label_names=["dog", "cat"])
        [9, 7]
    """
    mapping = _as_mapping(counts, name)
    if mapping is None:
        return counts
    names = None if label_names is None else list(label_names)
    if names is not None and set(mapping) == set(names):
        return [mapping[label_name] for label_name in names]
    return _by_label(mapping, name, "use torch.bincount(labels, minlength=num_classes)")


def integers_in_order(
    counts: Any, name: str = "class_counts", label_names: Iterable[str] | None = None
) -> tuple[int, ...]:
    """Convert counts in any form that `counts_in_order` accepts to a tuple of C ints.

    Raises:
        InputError: As for `counts_in_order`, or a count is not an integer.
    """
    try:
        values = counts_in_order(counts, name, label_names)
        if isinstance(values, Tensor):
            values = values.tolist()
        return tuple(_integer(value) for value in values)
    except TypeError as error:
        raise InputError(f"{name} must be one integer per class, the number of training images: {error}.") from error


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{value!r} is not an integer")
    return operator.index(value)


def names_in_order(names: Any, name: str = "label_names", *, unique: bool = True) -> tuple[str, ...]:
    """Class names in the order of the labels.

    Args:
        names: (C,) strings; or a mapping from label to name (`id2label`, with integers or strings of integers as keys)
            or from name to label (`label2id`, `class_to_idx`); or a pandas Series.
        name: Name of the argument in messages.
        unique: Whether to reject names that occur twice, also if only their Unicode normalization differs.

    Raises:
        InputError: The names have no order (a set, an iterator), a name is not a string or occurs twice, or a mapping
            does not have each label from 0 to `C - 1` once.

    Example:
        >>> names_in_order({"dog": 1, "cat": 0})
        ('cat', 'dog')
        >>> names_in_order({"0": "cat", "1": "dog"})
        ('cat', 'dog')
    """
    if isinstance(names, (str, bytes)):
        raise InputError(f'{name} must be one string per class, such as ["cat", "dog"], not the text {names!r:.50}.')
    mapping = _as_mapping(names, name)
    if mapping is not None:
        names = _invert(mapping, name) if _maps_names_to_labels(mapping) else mapping
        names = _by_label(names, name, "pass a list of names in label order")
    try:
        ordered = [value.item() if hasattr(value, "item") else value for value in names]  # strings of NumPy
    except TypeError as error:
        raise InputError(f"{name} must be one string per class, not {names!r:.50}.") from error
    for label, value in enumerate(ordered):
        if not isinstance(value, str):
            raise InputError(
                f'{name}[{label}]={value!r:.50} must be a string: pass one string per class, such as ["cat", "dog"].'
            )
    if unique:
        _check_unique(ordered, name)
    return tuple(ordered)


def _as_mapping(values: Any, name: str) -> Mapping[Any, Any] | None:
    """The mapping or Series as a mapping, None for an ordered collection; anything without an order is an error."""
    if isinstance(values, Mapping):
        return values
    pandas: Any = sys.modules.get("pandas")
    if pandas is not None and isinstance(values, pandas.Series):
        if not values.index.is_unique:
            label = values.index[values.index.duplicated()][0]
            raise InputError(f"{name} has several entries for the label {label}: aggregate them first.")
        return dict(values.items())
    reason = None
    if isinstance(values, ValuesView):
        reason = "the values of a dictionary are in the order of insertion, not of the labels: pass the dictionary"
    elif isinstance(values, Set):  # also the keys and items of a dictionary
        reason = "its entries are not in the order of the labels: pass a list with one entry per class"
    elif isinstance(values, Iterator):
        reason = "it can be read only once: pass a list with one entry per class"
    elif pandas is not None and isinstance(values, pandas.DataFrame):
        reason = "it is a table: pass the column with one entry per class"
    if reason is not None:
        raise InputError(f"{name} is a {type(values).__name__}; {reason}.")
    return None


def _by_label(mapping: Mapping[Any, Any], name: str, hint: str) -> list[Any]:
    """Values in the order of their integer keys."""
    labels: dict[int, Any] = {}
    for key, value in mapping.items():
        if isinstance(key, Tensor):
            raise InputError(f"{name} has tensors as keys, and equal tensors are different keys: {hint}.")
        label = _label(key, name, hint)
        if label in labels:
            raise InputError(f"{name} has several entries for the label {label}: keep one entry per class.")
        labels[label] = value
    if not labels:
        raise InputError(f"{name} is an empty {type(mapping).__name__}: {hint}.")
    size = len(labels)
    missing = [label for label in range(size) if label not in labels]
    if missing:
        outside = sorted(label for label in labels if not 0 <= label < size)
        raise InputError(
            f"{name} is a {type(mapping).__name__} with {size} entries, so the labels must be 0 to {size - 1}: missing "
            f"{_list(missing)}, out of range {_list(outside)}. Add the missing classes, or {hint}."
        )
    return [labels[label] for label in range(size)]


def _label(key: Any, name: str, hint: str) -> int:
    if isinstance(key, str) and re.fullmatch(r"-?[0-9]{1,18}", key):
        return int(key)
    try:
        if isinstance(key, bool) or type(key).__name__ in ("bool", "bool_"):
            raise TypeError
        return operator.index(key)
    except TypeError:
        raise InputError(
            f"{name} has {key!r:.50} where an integer label is needed, so the order of the classes is unknown: {hint}."
        ) from None


def _maps_names_to_labels(mapping: Mapping[Any, Any]) -> bool:
    return bool(mapping) and all(isinstance(key, str) and not isinstance(value, str) for key, value in mapping.items())


def _invert(mapping: Mapping[str, Any], name: str) -> dict[int, str]:
    inverse: dict[int, str] = {}
    for key, value in mapping.items():
        label = _label(value, name, "map each name to an integer label")
        if label in inverse:
            raise InputError(
                f"{name} maps both {inverse[label]!r:.100} and {key!r:.100} to the label {label}: keep one of them."
            )
        inverse[label] = key
    return inverse


def _check_unique(names: list[str], name: str) -> None:
    labels: dict[str, int] = {}
    for label, value in enumerate(names):
        normalized = unicodedata.normalize("NFC", value)
        first = labels.setdefault(normalized, label)
        if first != label:
            if names[first] != value:
                raise InputError(
                    f"{name} has {names[first]!a:.200} for the class {first} and {value!a:.200} for the class "
                    f"{label}, the same name up to Unicode normalization: rename a class."
                )
            raise InputError(f"{name} has {value!r:.100} for the classes {first} and {label}: rename one of them.")


def _list(labels: list[int]) -> str:
    return ", ".join(map(str, labels[:_MAX_LISTED])) + (", ..." if len(labels) > _MAX_LISTED else "")
