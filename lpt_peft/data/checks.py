"""Validation of labels and class names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lpt_peft._classes import names_in_order
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.samplers.checks import Labels, checked_labels

_SPLIT = "for a validation or test split pass class_names of the training set and allow_empty=True"


def checked_classes(
    labels: Labels, class_names: Sequence[str] | None, allow_empty: bool
) -> tuple[list[int], list[str], list[int]]:
    """Validate labels and class names; return labels (N,), class names (C,) and images per class (C,).

    Args:
        labels: Class of every image.
        class_names: (C,); None uses the numbers as names, and the largest label plus one as `C`.
        allow_empty: Accept classes without an image, as in a validation split.

    Raises:
        InputError: The labels are not integers of at least 0, a class has no image, all images belong to a single
            class, or a label has no name.
        ConfigError: `allow_empty` without `class_names`: the number of classes would be unknown.
    """
    rows = checked_labels(labels)
    names = None if class_names is None else list(names_in_order(class_names, "class_names"))
    for name in names or ():
        if not name.isprintable():
            raise InputError(
                f"The class name {name!r} has characters that cannot be printed or are not UTF-8, which a prompt file "
                "cannot store. Rename the class or its folder."
            )
    if allow_empty and names is None:
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
    if not allow_empty:
        _refuse_empty(rows, size, names)
    names = names if names is not None else [str(label) for label in range(size)]
    return rows.tolist(), names, np.bincount(rows, minlength=size).tolist()


def _refuse_empty(rows: np.ndarray, size: int, names: list[str] | None) -> None:
    present = np.unique(rows)
    if len(present) < size:
        # Searched among the labels that occur: an array as long as an absurdly large label would not fit in memory.
        first = int(np.argmax(np.append(present, size) != np.arange(len(present) + 1)))
        missing = f"label {first}" if names is None else f"label {first} ({names[first]!r})"
        raise InputError(
            f"{size - len(present)} of {size} classes have no image; the first is {missing}. Number the classes that "
            f"have images 0 to {len(present) - 1} without a gap; {_SPLIT}."
        )
    if size == 1:
        raise InputError(
            f"All {len(rows)} images belong to the same class, so a classifier cannot be trained. Give images of at "
            f"least two classes; {_SPLIT}."
        )
