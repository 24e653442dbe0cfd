"""Accuracy with chosen, random, averaged, no and fixed groups: whether the pool is worth its cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpt_peft.analysis._inputs import check_labels
from lpt_peft.errors import InputError
from lpt_peft.metrics.checks import as_integers


class Accuracy(NamedTuple):
    """Accuracy of predictions, as a fraction; None without images."""

    accuracy: float | None
    """Mean over images."""
    balanced_accuracy: float | None
    """Mean over classes with images."""
    per_class: Tensor
    """(C,) float64; NaN for classes without images."""


class PoolValue(NamedTuple):
    """Accuracy of each way to select groups."""

    rows: dict[str, Accuracy]
    """By the names that were given; with fixed groups also "fixed" and "oracle"."""
    fixed_group: int | None
    """The group of "fixed": that with the highest balanced accuracy when all images use it."""
    oracle_groups: Tensor | None
    """(C,) int64: the group of "oracle" for each class, the lowest of several; -1 for classes without images."""


def accuracy_of(prediction: Any, target: Any, num_classes: int) -> Accuracy:
    """Accuracy of predictions, over images and over classes.

    Args:
        prediction: Predicted classes (N,) or logits (N, C).
        target: True classes (N,), integers from 0 to `num_classes` - 1.
        num_classes: Number of classes C.

    Raises:
        InputError: A shape, dtype or class is wrong.

    Example:
        >>> accuracy_of([0, 0, 0, 0], [0, 0, 0, 1], num_classes=2)[:2]
        (0.75, 0.5)
    """
    truth = as_integers("target", target, num_classes)
    return _row(_correct("prediction", prediction, truth, num_classes), truth, num_classes)


def predicted_classes(logits: Tensor) -> Tensor:
    """Return predicted classes (N,) int64 of logits (N, C) on the CPU.

    Raises:
        InputError: Not floating point of two dimensions, or no class.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim != 2 or not logits.shape[1]:
        found = f"{logits.dtype} of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits)
        raise InputError(f"logits must be floating point (N, C), not {found}: pass the output of the classifier.")
    return logits.argmax(1).cpu()


def pool_value(
    predictions: Mapping[str, Any], target: Any, num_classes: int, *, fixed: Tensor | None = None
) -> PoolValue:
    r"""Compare ways to select groups on the same images and the same classifier.

    Usual rows are "chosen" (the k groups of the nearest keys), "random" (k random groups), "averaged" (the mean of all
    groups) and "none" (the shared prompt alone): the choice of the groups is worth chosen - random, and the groups are
    worth chosen - none if the row "none" is that of phase 1 with its own classifier. From predictions with each group
    alone follow

    .. math::
        \text{fixed} = \max_g \frac{1}{C} \sum_c a_{cg}, \qquad
        \text{oracle} = \frac{1}{C} \sum_c \max_g a_{cg}

    where :math:`a_{cg}` is the accuracy of class c if all images use group g. The oracle knows the class and selects on
    the images that it is measured on: it is an upper bound for groups per class, and with few images per class a
    generous bound.

    Args:
        predictions: Predicted classes (N,) or logits (N, C) for each way to select groups.
        target: True classes (N,), integers from 0 to `num_classes` - 1.
        num_classes: Number of classes C.
        fixed: Predicted classes (m, N) if all images use group 0, 1, ..., m - 1; None leaves out "fixed" and "oracle".

    Raises:
        InputError: A shape, dtype or class is wrong.

    Example:
        >>> fixed = torch.tensor([[0, 0, 0], [1, 1, 1]])
        >>> value = pool_value({"chosen": [0, 1, 1]}, [0, 0, 1], num_classes=2, fixed=fixed)
        >>> {name: row.balanced_accuracy for name, row in value.rows.items()}, value.oracle_groups.tolist()
        ({'chosen': 0.75, 'fixed': 0.5, 'oracle': 1.0}, [0, 1])
    """
    truth = as_integers("target", target, num_classes)
    rows = {
        name: _row(_correct(f"predictions[{name!r}]", values, truth, num_classes), truth, num_classes)
        for name, values in predictions.items()
    }
    if fixed is None:
        return PoolValue(rows, None, None)
    if not isinstance(fixed, Tensor) or fixed.ndim != 2 or not len(fixed):
        raise InputError("fixed must be predicted classes (m, N): pass a row of predictions for each group.")
    correct = torch.stack([_correct(f"fixed[{group}]", row, truth, num_classes) for group, row in enumerate(fixed)])
    total = torch.bincount(truth, minlength=num_classes)
    present = total > 0
    balanced = (correct.double() / total)[:, present].mean(1)
    best = int(balanced.argmax()) if bool(present.any()) else 0
    groups = correct.argmax(0)
    rows["fixed"] = _row(correct[best], truth, num_classes)
    rows["oracle"] = _row(correct.amax(0), truth, num_classes)
    return PoolValue(rows, best, groups.masked_fill(~present, -1))


def _correct(name: str, values: Any, truth: Tensor, num_classes: int) -> Tensor:
    """Correct images of each class (C,) int64, from predictions (N,) or logits (N, C)."""
    if isinstance(values, Tensor) and values.is_floating_point():
        if values.ndim == 2 and values.shape[1] != num_classes:
            raise InputError(
                f"{name} has {values.shape[1]} columns for {num_classes} classes: pass logits of all classes."
            )
        values = predicted_classes(values)
    predicted = check_labels(name, values, len(truth), num_classes)
    return torch.bincount(truth[predicted == truth], minlength=num_classes)


def _row(correct: Tensor, truth: Tensor, num_classes: int) -> Accuracy:
    total = torch.bincount(truth, minlength=num_classes)
    per_class = correct.double() / total
    if not len(truth):
        return Accuracy(None, None, per_class)
    return Accuracy(int(correct.sum()) / len(truth), float(per_class[total > 0].mean()), per_class)
