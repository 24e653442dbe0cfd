"""Class counts and image indices of long-tailed subsets, from labels alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from lpt_peft._numbers import checked_integer
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.samplers.checks import Labels, checked_labels

Kind = Literal["exp", "step"]


def exponential_counts(num_classes: int, largest: int, imbalance: float) -> list[int]:
    """Compute images per class, `int(largest * (1 / imbalance)^(j / (C - 1)))` for class `j`.

    Args:
        num_classes: Number of classes `C`, at least 2.
        largest: Images of class 0, at least 1.
        imbalance: Largest over smallest count, at least 1.

    Raises:
        ConfigError: An argument is out of range, or a class would have no image.

    Example:
        >>> counts = exponential_counts(num_classes=100, largest=500, imbalance=100)
        >>> counts[0], counts[-1], sum(counts)
        (500, 5, 10847)
    """
    return _counts("exp", num_classes, largest, imbalance)


def step_counts(num_classes: int, largest: int, imbalance: float) -> list[int]:
    """Compute images per class: `largest` for the first half of the classes, `int(largest / imbalance)` for the others.

    The step imbalance of Buda et al. (2018, arXiv 1710.05381) with half of the classes in the minority, as used on
    CIFAR by LDAM (Cao et al., NeurIPS 2019). For odd `C` the class in the middle belongs to the first half.

    Args:
        num_classes: Number of classes `C`, at least 2.
        largest: Images of class 0, at least 1.
        imbalance: Largest over smallest count, at least 1.

    Raises:
        ConfigError: An argument is out of range, or a class would have no image.

    Example:
        >>> step_counts(num_classes=5, largest=500, imbalance=100)
        [500, 500, 500, 5, 5]
    """
    return _counts("step", num_classes, largest, imbalance)


def cifar_lt_indices(labels: Sequence[int], imbalance: float, kind: Kind = "exp") -> list[int]:
    """Compute the standard CIFAR-10/100-LT subset: indices into the training set, class after class.

    A legacy numpy generator with seed 0 shuffles the indices of each class, in class order, and the first `n_j` of
    each class are kept. There is no seed argument because another seed would define another data set. The global
    generator of numpy is not used.

    Args:
        labels: Class of every training image in the order of the archive, `N` integers from 0 to `C - 1`, all classes
            of equal size.
        imbalance: 100, 50 or 10 in the literature.
        kind: "exp" for `exponential_counts`, "step" for `step_counts`.

    Raises:
        InputError: The labels are not balanced over 0 to `C - 1`.
        ConfigError: The imbalance is out of range, or the kind is unknown.
    """
    classes = np.asarray(labels)
    sizes = np.bincount(classes) if classes.ndim == 1 and len(classes) and classes.min() >= 0 else np.zeros(1)
    if len(sizes) < 2 or sizes.min() != sizes.max():
        raise InputError(
            "cifar_lt_indices needs the labels of the balanced CIFAR training set, but these labels are not balanced. "
            "For other data call make_long_tailed."
        )
    generator = np.random.RandomState(0)
    kept: list[int] = []
    for label, count in enumerate(_counts(kind, len(sizes), int(sizes[0]), imbalance)):
        indices = np.flatnonzero(classes == label)
        generator.shuffle(indices)
        kept += indices[:count].tolist()
    return kept


def make_long_tailed(labels: Labels, imbalance: float, kind: Kind = "exp", *, seed: int = 0) -> list[int]:
    """Choose a long-tailed subset of any labelled data; return its indices, class after class.

    Class 0 becomes the largest class. Its count is the largest for which every class has enough images; on balanced
    data this is the whole class. Images are drawn without replacement by `seed`. With the same seed on balanced data,
    the subset of a higher imbalance is contained in that of a lower imbalance. For CIFAR use `cifar_lt_indices`.

    Args:
        labels: Class of every image, (N,) integers from 0 to `C - 1`, each at least once.
        imbalance: Largest over smallest count, at least 1.
        kind: "exp" for `exponential_counts`, "step" for `step_counts`.
        seed: Integer of at least 0.

    Raises:
        InputError: The labels are empty, negative, not integers, all equal, or have a gap.
        ConfigError: The imbalance or the seed is out of range, the kind is unknown, or a class would have no image.

    Example:
        >>> labels = [0] * 40 + [1] * 40 + [2] * 40
        >>> kept = make_long_tailed(labels, imbalance=10)
        >>> [sum(labels[index] == label for index in kept) for label in range(3)]
        [40, 12, 4]
    """
    classes = checked_labels(labels)
    present, sizes = np.unique(classes, return_counts=True)
    if len(present) < 2 or present[-1] != len(present) - 1:
        raise InputError(
            f"make_long_tailed needs labels from 0 to C - 1 of at least two classes, each at least once; there are "
            f"{len(present)} classes and the largest label is {present[-1]}. Number the classes without a gap."
        )
    shares = _shares(kind, len(sizes), imbalance)
    largest = _floor(min(size / share for size, share in zip(sizes.tolist(), shares, strict=True)))
    generator = np.random.default_rng(checked_integer("seed", seed, 0))
    kept: list[int] = []
    for label, count in enumerate(_counts(kind, len(sizes), largest, imbalance)):
        kept += generator.permutation(np.flatnonzero(classes == label))[:count].tolist()
    return kept


def _counts(kind: Kind, num_classes: int, largest: int, imbalance: float) -> list[int]:
    if num_classes < 2 or largest < 1:
        raise ConfigError(f"Counts need num_classes >= 2 and largest >= 1, got {num_classes} and {largest}.")
    counts = [_floor(largest * share) for share in _shares(kind, num_classes, imbalance)]
    if counts[-1] < 1:
        raise ConfigError(
            f"imbalance={imbalance} leaves class {num_classes - 1} no image of {largest}; lower the imbalance."
        )
    return counts


def _floor(number: float) -> int:
    """Round down; a number below an integer by floating-point error alone counts as that integer."""
    return int(number + 1e-9)


def _shares(kind: Kind, num_classes: int, imbalance: float) -> list[float]:
    """Compute the size of each class relative to class 0."""
    if not 1 <= imbalance < math.inf:
        raise ConfigError(f"Largest over smallest count must be finite and imbalance >= 1, got imbalance={imbalance}.")
    if kind == "exp":
        return [(1 / imbalance) ** (j / (num_classes - 1)) for j in range(num_classes)]
    if kind == "step":
        return [1.0 if 2 * j < num_classes else 1 / imbalance for j in range(num_classes)]
    raise ConfigError(f'kind={kind!r} must be "exp" or "step".')
