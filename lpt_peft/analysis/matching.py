"""Statistics of the groups that images of each class select from the pool."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpt_peft._numbers import checked_integer
from lpt_peft.analysis._inputs import check_labels
from lpt_peft.errors import InputError


class Matching(NamedTuple):
    """Which groups the classes select. Entropies are in bits; None if nothing was selected."""

    usage: Tensor
    """(m,) int64: images that selected each group."""
    unused: tuple[int, ...]
    """Groups that no image selected."""
    group_entropy: float | None
    """Entropy of the usage, at most log2(m): 2 to its power is the number of groups in equal use."""
    class_entropy: Tensor
    """(C,) float64: entropy of the selections of each class; NaN for a class without images."""
    mutual_information: float | None
    """Information about the class in a selected group: 0 if all classes select alike."""
    chance: float | None
    """`mutual_information` to expect from as many images if class and group are independent."""


def group_histogram(groups: Tensor, labels: Any, num_classes: int, num_groups: int) -> Tensor:
    """Count the images of each class that selected each group, (C, m) int64.

    Args:
        groups: Selected groups (N, k), integers from 0 to `num_groups` - 1, as in `AdapterOutput.groups`.
        labels: Classes (N,), integers from 0 to `num_classes` - 1.
        num_classes: Number of classes C.
        num_groups: Number of groups m of the pool.

    Raises:
        InputError: A shape or dtype is wrong, or a class or group is out of range.

    Example:
        >>> group_histogram(torch.tensor([[0, 1], [0, 2], [2, 1]]), [0, 0, 1], num_classes=2, num_groups=3)
        tensor([[2, 1, 1],
                [0, 1, 1]])
    """
    num_classes = checked_integer("num_classes", num_classes, 1)
    num_groups = checked_integer("num_groups", num_groups, 1)
    if not isinstance(groups, Tensor) or groups.ndim != 2 or groups.is_floating_point() or groups.dtype == torch.bool:
        found = f"{groups.dtype} of shape {tuple(groups.shape)}" if isinstance(groups, Tensor) else type(groups)
        raise InputError(f"groups must be integers (N, k), not {found}: pass output.groups of the adapter.")
    classes = check_labels("labels", labels, len(groups), num_classes)
    chosen = groups.cpu().long()
    if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= num_groups):
        raise InputError(
            f"groups has values from {int(chosen.min())} to {int(chosen.max())}, but the {num_groups} groups of the "
            f"pool are 0 to {num_groups - 1}: pass num_groups=adapter.prompt_config.pool_size."
        )
    codes = (classes[:, None] * num_groups + chosen).flatten()
    return torch.bincount(codes, minlength=num_classes * num_groups).view(num_classes, num_groups)


def matching_statistics(histogram: Tensor) -> Matching:
    r"""Usage, entropies and mutual information of a class x group histogram.

    With :math:`p_{cg}` the share of a class and group among all selections,

    .. math::
        H_c = -\sum_g p_{g|c} \log_2 p_{g|c}, \qquad
        I = \sum_{c,g} p_{cg} \log_2 \frac{p_{cg}}{p_c \, p_g}, \qquad
        \text{chance} = \frac{(C' - 1)(m' - 1)}{2 n \ln 2}

    with C' classes, m' groups and n selections that occur. The chance level is the first-order bias of I (Miller,
    "Note on the bias of information estimates", 1955): with few images per class, I is positive without any relation.
    The k selections of an image count as separate selections.

    Args:
        histogram: (C, m) integers of at least 0, of `group_histogram`.

    Raises:
        InputError: Another shape or dtype, or a negative count.

    Example:
        >>> result = matching_statistics(torch.tensor([[4, 0, 0], [0, 4, 0]]))
        >>> result.mutual_information, result.unused, result.class_entropy.tolist()
        (1.0, (2,), [0.0, 0.0])
    """
    if not isinstance(histogram, Tensor) or histogram.ndim != 2 or histogram.is_floating_point():
        raise InputError("histogram must be integers (C, m): pass the result of group_histogram().")
    counts = histogram.cpu().long()
    if bool((counts < 0).any()):
        raise InputError("histogram has a negative count: pass the result of group_histogram().")
    usage, images = counts.sum(0), counts.sum(1)
    unused = tuple((usage == 0).nonzero().flatten().tolist())
    class_entropy = _entropy(counts.double() / images[:, None])
    class_entropy[images == 0] = torch.nan
    total = int(usage.sum())
    if total == 0:
        return Matching(usage, unused, None, class_entropy, None, None)
    group_entropy = float(_entropy(usage.double() / total))
    shares = images.double() / total
    present = images > 0
    # I = H(group) - H(group | class); rounding can give -0.0000 for independent counts.
    information = max(0.0, group_entropy - float((shares * class_entropy)[present].sum()))
    chance = (int(present.sum()) - 1) * (int((usage > 0).sum()) - 1) / (2 * total * math.log(2))
    return Matching(usage, unused, group_entropy, class_entropy, information, chance)


def _entropy(shares: Tensor) -> Tensor:
    """Entropy in bits of shares (..., m) along the last dimension."""
    # Shares of a class without images are NaN.
    products: Tensor = torch.special.xlogy(shares, shares)
    return -products.sum(-1) / math.log(2) + 0.0
