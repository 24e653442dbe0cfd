"""Distances within classes and between classes, and their ratio gamma."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lpt_peft._numerics import at_least_float32
from lpt_peft.analysis._inputs import check_labels, check_rows, chunks, unit_rows
from lpt_peft.errors import ConfigError, InputError

Distance = Literal["cosine", "squared"]


class Separability(NamedTuple):
    """Mean distances of features within and between classes; a mean over nothing is None."""

    intra: float | None
    """Mean over the classes with at least two images of their `intra_per_class`."""
    inter: float | None
    """Mean over all pairs of classes of the mean distance between their images."""
    gamma: float | None
    """`intra / inter`: smaller values mean better separated classes; None without either, or if `inter` is 0."""
    intra_per_class: Tensor
    """(C,) float64: mean distance of two different images of a class; NaN with fewer than two images."""


@torch.no_grad()
def separability(features: Tensor, labels: Any, num_classes: int, *, distance: Distance = "cosine") -> Separability:
    r"""Mean distance within classes, between classes, and their ratio gamma.

    With the images :math:`X_c` of class c, :math:`n_c` of them, C' classes that have two images, and P pairs of
    different classes that have images:

    .. math::
        R_c &= \frac{1}{n_c (n_c - 1)} \sum_{x \ne x' \in X_c} d(x, x'), \quad
        D_{ab} = \frac{1}{n_a n_b} \sum_{x \in X_a, x' \in X_b} d(x, x') \\
        \gamma &= \frac{1}{C'} \sum_c R_c \Big/ \frac{1}{P} \sum_{a < b} D_{ab}

    d is the cosine distance :math:`1 - \cos(x, x')`, that of the cosine classifier, or the squared Euclidean distance.
    LPT (Dong et al., ICLR 2023, arXiv 2210.01033) compares such a gamma of VPT and LPT; its program is not the source
    of this definition, so compare values of this function only with one another. Both distances have closed forms in
    the sums of the classes, so all pairs are counted exactly in O(N d + C d) operations: for the squared distance and
    class means :math:`\mu_c`, :math:`R_c = 2 \frac{n_c}{n_c - 1} (\overline{\|x\|^2} - \|\mu_c\|^2)`.

    Args:
        features: (N, d) floating point.
        labels: Classes (N,), integers from 0 to `num_classes` - 1.
        num_classes: Number of classes C.
        distance: "cosine" or "squared".

    Raises:
        InputError: A shape is wrong, a value is not finite, or a label is out of range.
        ConfigError: The distance is unknown.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> separability(features, [0, 0, 1], num_classes=2)[:3]
        (0.0, 1.0, 0.0)
    """
    if distance not in get_args(Distance):
        raise ConfigError(f'distance={distance!r} must be "cosine" or "squared".')
    check_rows("features", features)
    classes = check_labels("labels", labels, len(features), num_classes)
    sums, squares = _class_sums(features, classes.to(features.device), num_classes, unit=distance == "cosine")
    counts = torch.bincount(classes, minlength=num_classes).double()
    means = sums / counts[:, None]
    # Rounding can give -0.0000 for equal images.
    spread = (squares / counts - means.square().sum(1)).clamp(min=0)
    intra = 2 * spread * counts / (counts - 1)
    intra[counts < 2] = torch.nan
    inter = _mean_between(means[counts > 0], (squares / counts)[counts > 0])
    if distance == "cosine":  # 1 - cos is half the squared distance of unit vectors
        intra, inter = intra / 2, None if inter is None else inter / 2
    several = intra[counts >= 2]
    mean = float(several.mean()) if len(several) else None
    gamma = None if mean is None or not inter else mean / inter
    return Separability(mean, inter, gamma, intra)


def _class_sums(features: Tensor, classes: Tensor, num_classes: int, *, unit: bool) -> tuple[Tensor, Tensor]:
    """Sums of the features (C, d) and of their squared norms (C,) by class, float64 on the CPU."""
    width = features.shape[1]
    sums = torch.zeros(num_classes, width, dtype=torch.float64, device=features.device)
    squares = torch.zeros(num_classes, dtype=torch.float64, device=features.device)
    for rows in chunks(len(features), 20 * width):
        part = features[rows]
        if unit and not bool(part.any(1).all()):
            raise InputError(
                'features contain a row of zeros, whose cosine is undefined: remove it, or pass distance="squared".'
            )
        part = (unit_rows(part) if unit else at_least_float32(part)).double()
        sums.index_add_(0, classes[rows], part)
        squares.index_add_(0, classes[rows], part.square().sum(1))
    return sums.cpu(), squares.cpu()


def _mean_between(means: Tensor, squares: Tensor) -> float | None:
    """Mean over pairs of classes of the mean squared distance of their images.

    Args:
        means: (C, d) class means.
        squares: (C,) mean squared norms of the images.
    """
    size = len(means)
    if size < 2:
        return None
    # sum over a != b of (s_a + s_b - 2 m_a.m_b), where sum of m_a.m_b is that of all pairs less that of equal classes
    products = means.sum(0).square().sum() - means.square().sum()
    return max(0.0, float(2 * (size - 1) * squares.sum() - 2 * products) / (size * (size - 1)))
