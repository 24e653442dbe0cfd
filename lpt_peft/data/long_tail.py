"""Which images a long-tailed version of a balanced data set keeps: counts and indices from labels alone.

Not here: images, files, transforms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lpt_peft.errors import ConfigError, InputError


def exponential_counts(num_classes: int, largest: int, imbalance: float) -> list[int]:
    """Images per class, `int(largest * (1 / imbalance)^(j / (C - 1)))` for class `j`.

    Args:
        num_classes: Classes `C`, at least 2.
        largest: Images of class 0, at least 1.
        imbalance: Largest over smallest count, at least 1.

    Raises:
        ConfigError: A number is out of range, or a class would be left without an image.

    Example:
        >>> counts = exponential_counts(num_classes=100, largest=500, imbalance=100)
        >>> counts[0], counts[-1], sum(counts)
        (500, 5, 10847)
    """
    if num_classes < 2 or largest < 1 or not imbalance >= 1:
        raise ConfigError(
            f"exponential_counts needs num_classes >= 2, largest >= 1 and imbalance >= 1, got {num_classes}, "
            f"{largest} and {imbalance}."
        )
    counts = [int(largest * (1 / imbalance) ** (j / (num_classes - 1))) for j in range(num_classes)]
    if counts[-1] < 1:
        raise ConfigError(f"imbalance={imbalance} leaves class {num_classes - 1} no image of {largest}; lower it.")
    return counts


def cifar_lt_indices(labels: Sequence[int], imbalance: float) -> list[int]:
    """The accepted CIFAR-10/100-LT split: indices into the training set, class after class.

    One legacy numpy generator seeded 0 shuffles the indices of class after class, in class order, and
    the first `n_j` of each are kept. Another seed would be another data set, so there is no such argument.
    The global generator of numpy is not touched.

    Args:
        labels: Class of every training image in the archive's order, `N` whole numbers from 0 to `C - 1`, equally
            many of each.
        imbalance: 100, 50 or 10 in the literature.

    Raises:
        InputError: The labels are not balanced over 0 to `C - 1`.
        ConfigError: The imbalance is out of range.
    """
    classes = np.asarray(labels)
    sizes = np.bincount(classes) if classes.ndim == 1 and len(classes) and classes.min() >= 0 else np.zeros(1)
    if len(sizes) < 2 or sizes.min() != sizes.max():
        raise InputError(
            "cifar_lt_indices takes the labels of the balanced CIFAR training set; these are not balanced."
        )
    generator = np.random.RandomState(0)
    kept: list[int] = []
    for label, count in enumerate(exponential_counts(len(sizes), int(sizes[0]), imbalance)):
        indices = np.flatnonzero(classes == label)
        generator.shuffle(indices)
        kept += indices[:count].tolist()
    return kept
