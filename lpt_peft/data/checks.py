"""What a labelled set of images refuses: labels that are none, classes without an image, names that do not fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lpt_peft.errors import ConfigError, InputError
from lpt_peft.samplers.checks import Labels, checked_labels

_PART = "for a validation or test part pass class_names of the training set and allow_empty=True"


def checked_classes(
    labels: Labels, class_names: Sequence[str] | None, allow_empty: bool
) -> tuple[list[int], list[str], list[int]]:
    """Labels (N,), class names (C,) and images per class (C,) that fit together.

    Args:
        labels: Class of every image.
        class_names: None takes the numbers as names, and the largest label plus one as `C`.
        allow_empty: Classes may be without an image, as in a validation part.

    Raises:
        InputError: The labels are no whole numbers of at least 0, a class has no image, all are of one class, or a
            label has no name.
        ConfigError: `allow_empty` without `class_names`: nothing would tell how many classes there are.
    """
    rows = checked_labels(labels)
    names = None if class_names is None else [str(name) for name in class_names]
    for name in names or ():
        if not name.isprintable():
            raise InputError(
                f"The class name {name!r} holds what cannot be printed, or is not in UTF-8: no prompt file could carry "
                "it. Rename the class, or its folder."
            )
    if allow_empty and names is None:
        raise ConfigError(
            "allow_empty=True needs class_names: a part that lacks classes cannot tell how many there are."
        )
    size = int(rows.max()) + 1 if names is None else len(names)
    if rows.max() >= size:
        place = int(rows.argmax())
        raise InputError(
            f"labels[{place}] is {rows[place]}, but there are {size} class names, for labels 0 to {size - 1}. Give a "
            "name for every class, in the order of the labels."
        )
    if not allow_empty:
        _refuse_empty(rows, size, names)
    names = names if names is not None else [str(label) for label in range(size)]
    return rows.tolist(), names, np.bincount(rows, minlength=size).tolist()


def _refuse_empty(rows: np.ndarray, size: int, names: list[str] | None) -> None:
    present = np.unique(rows)
    if len(present) < size:
        # The labels that are there, up to the first hole: never an array as long as an absurd label is large.
        first = int(np.argmax(np.append(present, size) != np.arange(len(present) + 1)))
        told = f"label {first}" if names is None else f"label {first} ({names[first]!r})"
        raise InputError(
            f"{size - len(present)} of {size} classes have no image; the first is {told}. Number the classes that have "
            f"images 0 to {len(present) - 1} without a gap; {_PART}."
        )
    if size == 1:
        raise InputError(
            f"All {len(rows)} images are of one class: there is nothing to tell apart. Give images of two classes or "
            f"more; {_PART}."
        )
