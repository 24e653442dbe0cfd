"""Validation of labels and class names."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from lpt_peft._classes import names_in_order
from lpt_peft._text import control_character, name_skeleton
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.samplers.checks import Labels, checked_labels

ClassNames = Sequence[str] | Mapping[int, str] | Mapping[str, int]
_MOST_EMPTY = 100_000  # a label far above the number of images is a mistake, and its counts would not fit in memory
_SPLIT = "for a validation or test split pass class_names of the training set and allow_empty=True"


def checked_classes(
    labels: Labels, class_names: ClassNames | None, allow_empty: bool | Literal["infer"]
) -> tuple[list[int], list[str], list[int]]:
    """Validate labels and class names; return labels (N,), class names (C,) and images per class (C,).

    Args:
        labels: Class of every image.
        class_names: (C,), or a mapping from label to name or from name to label; None uses the numbers as names, and
            the largest label plus one as `C`.
        allow_empty: Accept classes without an image, as in a validation split; "infer" also without `class_names`.

    Raises:
        InputError: The labels are not integers of at least 0, a class has no image, all images belong to a single
            class, a label has no name, or the names are invalid for `checked_names`.
        ConfigError: `allow_empty` without `class_names`: the number of classes would be unknown.
    """
    rows = checked_labels(labels)
    names = None if class_names is None else checked_names(class_names)
    if allow_empty and allow_empty != "infer" and names is None:
        raise ConfigError(
            "allow_empty=True needs class_names: the number of classes is unknown where classes have no image."
        )
    size = int(rows.max()) + 1 if names is None else len(names)
    if rows.max() >= size:
        position = int(rows.argmax())
        raise InputError(
            f"labels[{position}] is {rows[position]}, but there are {size} class names, for labels 0 to {size - 1}. "
            "Give a name for every class, in the order of the labels."
        )
    if not allow_empty or (names is None and size > _MOST_EMPTY + 100 * len(rows)):
        _refuse_empty(rows, size, names)
    names = names if names is not None else [str(label) for label in range(size)]
    return rows.tolist(), names, np.bincount(rows, minlength=size).tolist()


def checked_names(class_names: ClassNames) -> list[str]:
    """Validate class names; return them in the order of the labels.

    Raises:
        InputError: The names have no order, a name is empty or occurs twice, or it has control characters or bytes that
            are not UTF-8.
    """
    names = list(names_in_order(class_names, "class_names"))
    for name in names:
        kinds = {unicodedata.category(character) for character in name}
        if not name:
            raise InputError("A class name is empty, which a prompt file cannot store. Give every class a name.")
        if kinds & {"Cc", "Cs"}:
            # Python reads bytes of a file name that are not UTF-8 as surrogates.
            problem = (
                "bytes that are not UTF-8" if "Cs" in kinds else f"the control character {control_character(name)}"
            )
            raise InputError(
                f"The class name {name!r} has {problem}, which a prompt file cannot store. Rename the class or its "
                "folder."
            )
    return names


def look_alike_notes(names: Sequence[str]) -> list[str]:
    """Remarks on names that look alike but are different classes.

    Example:
        >>> look_alike_notes(["cat", "Cat", "dog"])
        ["classes whose names differ only in case, spaces or invisible characters: 'cat', 'Cat'"]
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name_skeleton(name), []).append(name)
    return [
        f"classes whose names differ only in case, spaces or invisible characters: {', '.join(map(repr, group))}"
        for group in groups.values()
        if len(group) > 1
    ]


def distinct_names(names: Sequence[str]) -> list[str]:
    """Append the label to names that occur several times, so that their classes remain different.

    Example:
        >>> distinct_names(["crane", "maillot", "crane"])
        ['crane (0)', 'maillot', 'crane (2)']
    """
    counts = Counter(unicodedata.normalize("NFC", name) for name in names)
    repeated = [counts[unicodedata.normalize("NFC", name)] > 1 for name in names]
    return [f"{name} ({label})" if repeated[label] else name for label, name in enumerate(names)]


def _refuse_empty(rows: np.ndarray, size: int, names: list[str] | None) -> None:
    present = np.unique(rows)
    if len(present) < size:
        # Searched among the labels that occur: an array as long as an absurdly large label would not fit in memory.
        first = int(np.argmax(np.append(present, size) != np.arange(len(present) + 1)))
        missing = f"label {first}" if names is None else f"label {first} ({names[first]!r})"
        if names is None and present[0] == 1 and present[-1] == len(present):
            raise InputError(
                f"Labels start at 1: subtract 1 from each, so that the {len(present)} classes have the labels 0 to "
                f"{len(present) - 1}. Label 0 has no image."
            )
        raise InputError(
            f"{size - len(present)} of {size} classes have no image; the first is {missing}. Number the classes that "
            f"have images 0 to {len(present) - 1} without a gap; {_SPLIT}."
        )
    if size == 1:
        raise InputError(
            f"All {len(rows)} images belong to the same class, so a classifier cannot be trained. Give images of at "
            f"least two classes; {_SPLIT}."
        )
