"""Pairs of classes that are confused, classes that are never right, and the worst classes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpt_peft._numbers import checked_integer, is_finite_number
from lpt_peft.analysis._inputs import check_correct, check_labels
from lpt_peft.errors import ConfigError
from lpt_peft.metrics.checks import as_integers


class Confusion(NamedTuple):
    """Wrong predictions by pair of classes, most frequent pair first; P pairs."""

    target: Tensor
    """(P,) int64: true class."""
    prediction: Tensor
    """(P,) int64: predicted class."""
    images: Tensor
    """(P,) int64: images of the pair."""
    share: Tensor
    """(P,) float64: share of all images of the true class."""


class WeakClasses(NamedTuple):
    """Classes on which a model fails; classes without images do not count."""

    never_right: tuple[int, ...]
    """Classes without a correct prediction."""
    worst: tuple[int, ...]
    """The classes of lowest accuracy, lowest first."""
    worst_accuracy: float | None
    """Mean accuracy of `worst`; None without images."""


def confused_pairs(target: Any, prediction: Any, num_classes: int, *, limit: int | None = None) -> Confusion:
    """Count the wrong predictions of each pair (true class, predicted class), without a C x C matrix.

    Pairs are ordered by images, then by share of the true class, both largest first, then by class. O(N log N)
    operations and O(N) memory, whatever the number of classes.

    Args:
        target: True classes (N,), integers from 0 to `num_classes` - 1.
        prediction: Predicted classes (N,).
        num_classes: Number of classes C.
        limit: Number of pairs to return; None returns all.

    Raises:
        InputError: A label is out of range, or the lengths differ.

    Example:
        >>> pairs = confused_pairs([0, 0, 1, 2], [1, 1, 1, 0], num_classes=3)
        >>> list(zip(pairs.target.tolist(), pairs.prediction.tolist(), pairs.images.tolist()))
        [(0, 1, 2), (2, 0, 1)]
    """
    truth = as_integers("target", target, num_classes)
    predicted = check_labels("prediction", prediction, len(truth), num_classes)
    if limit is not None:
        limit = checked_integer("limit", limit, 0)
    wrong = truth != predicted
    codes, images = torch.unique(truth[wrong] * num_classes + predicted[wrong], return_counts=True)
    rows = codes // num_classes
    share = images.double() / torch.bincount(truth, minlength=num_classes)[rows]
    order = share.argsort(descending=True, stable=True)
    order = order[images[order].argsort(descending=True, stable=True)][:limit]
    return Confusion(rows[order], codes[order] % num_classes, images[order], share[order])


def weak_classes(correct: Any, total: Any, *, share: float = 0.05) -> WeakClasses:
    """Find the classes that are never right, and the share of classes with the lowest accuracy.

    Args:
        correct: Correctly classified images of each class (C,), integers.
        total: Images of each class (C,), integers.
        share: Share of the classes with images that counts as worst, rounded up.

    Raises:
        InputError: The counts are invalid.
        ConfigError: `share` is not above 0 and at most 1.

    Example:
        >>> weak_classes([9, 0, 1, 0], [10, 5, 4, 0], share=0.5)
        WeakClasses(never_right=(1,), worst=(1, 2), worst_accuracy=0.125)
    """
    if not is_finite_number(share) or not 0 < share <= 1:
        raise ConfigError(f"share={share!r} must be a number above 0, at most 1.")
    right, images = check_correct(correct, total)
    present = (images > 0).nonzero().flatten()
    accuracy = right[present].double() / images[present]
    order = accuracy.argsort(stable=True)[: math.ceil(share * len(present))]
    return WeakClasses(
        never_right=tuple(present[right[present] == 0].tolist()),
        worst=tuple(present[order].tolist()),
        worst_accuracy=float(accuracy[order].mean()) if len(order) else None,
    )
