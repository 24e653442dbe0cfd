"""Linear discriminant analysis: features in a plane, and the distance of two sets of features."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpt_peft._numbers import checked_integer, is_finite_number
from lpt_peft._numerics import at_least_float32
from lpt_peft.analysis._inputs import check_labels, check_rows, chunks
from lpt_peft.errors import ConfigError, InputError

_FLOOR = 1e-8


class Discriminant(NamedTuple):
    """Directions in which classes differ most, relative to the spread within classes."""

    mean: Tensor
    """(d,) float64: mean of the features."""
    directions: Tensor
    """(d, q) float64: columns w with w' S_w w = 1."""
    ratio: Tensor
    """(q,) float64: variance between classes over variance within classes, largest first."""
    shrinkage: float
    """Shrinkage of S_w that was used."""

    def project(self, features: Tensor) -> Tensor:
        """Coordinates (N, q) float64, on the CPU, of features (N, d)."""
        check_rows("features", features, len(self.mean))
        parts = chunks(len(features), 12 * features.shape[1])
        return torch.cat([(features[rows].cpu().double() - self.mean) @ self.directions for rows in parts])


class TwoSets(NamedTuple):
    """Two sets of features in a plane, and whether a line separates them."""

    first: Tensor
    """(N1, 2) float64: images of the first set that did not fit the directions."""
    second: Tensor
    """(N2, 2) float64: the same of the second set."""
    separation: float
    """Balanced accuracy of the best line between the fitted halves, on these images: 1 separate, 0.5 aligned."""
    shrinkage: float
    """Shrinkage that was used."""


@torch.no_grad()
def linear_discriminant(
    features: Tensor, labels: Any, *, components: int = 2, shrinkage: float | None = None
) -> Discriminant:
    r"""Fisher's linear discriminant analysis.

    The directions solve :math:`S_b w = \lambda \tilde S_w w` for the largest :math:`\lambda`, with the covariances
    between and within classes, class c with :math:`n_c` of N images:

    .. math::
        S_b = \sum_c \frac{n_c}{N} (\mu_c - \mu)(\mu_c - \mu)^\top, \quad
        S_w = \frac{1}{N} \sum_c \sum_{x \in X_c} (x - \mu_c)(x - \mu_c)^\top, \quad
        \tilde S_w = (1 - \alpha) S_w + \alpha \frac{\operatorname{tr} S_w}{d} I

    With few images S_w is singular and LDA separates any labels, so :math:`\alpha` is estimated by default (Ledoit &
    Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004). A picture of the images that
    the directions were fitted on looks better than that of others: project other images.

    In chunks: O(N d^2) operations, O(d^2 + C d) memory.

    Args:
        features: (N, d) floating point.
        labels: Classes (N,), integers of at least 0, at least two different.
        components: Number of directions q, at most d and below the number of classes.
        shrinkage: :math:`\alpha` from 0 to 1; None estimates it.

    Raises:
        InputError: A shape is wrong, a value is not finite, there is a single class, or all features of each class are
            equal.
        ConfigError: `components` or `shrinkage` is out of range.

    Example:
        >>> features = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
        >>> plane = linear_discriminant(features, [0, 0, 1, 1], components=1, shrinkage=0.1)
        >>> plane.project(features).abs().round().flatten().tolist()
        [40.0, 40.0, 40.0, 40.0]
    """
    check_rows("features", features)
    found, classes = check_labels("labels", labels, len(features), None).unique(return_inverse=True)
    size, width = len(found), features.shape[1]
    if size < 2:
        raise InputError("labels have a single class: discriminant analysis needs at least two.")
    components = checked_integer("components", components, 1, min(size - 1, width))
    if shrinkage is not None and (not is_finite_number(shrinkage) or not 0 <= shrinkage <= 1):
        raise ConfigError(f"shrinkage={shrinkage!r} must be None or a number from 0 to 1.")
    weights = torch.bincount(classes).double()
    means = _sums(features, classes, size) / weights[:, None]
    mean = (weights @ means) / len(features)
    within, fourth = _within(features, classes, means)
    if not bool(within.diagonal().sum() > 0):
        raise InputError("All features of each class are equal, so nothing varies within a class: pass more images.")
    alpha = _ledoit_wolf(within, fourth, len(features)) if shrinkage is None else float(shrinkage)
    shrunk = (1 - alpha) * within
    shrunk.diagonal().add_(alpha * within.trace() / width)
    offsets = (means - mean) * (weights / len(features)).sqrt()[:, None]
    # With S_w = V diag(e) V', the problem is that of an ordinary symmetric matrix in the coordinates V e^(-1/2).
    values, vectors = torch.linalg.eigh(shrunk)
    keep = values > _FLOOR * values[-1]  # directions without spread, if shrinkage is 0
    whiten = vectors[:, keep] / values[keep].sqrt()
    components = min(components, whiten.shape[1])
    _, singular, right = torch.linalg.svd(offsets @ whiten, full_matrices=False)
    directions = whiten @ right[:components].T
    return Discriminant(mean, directions * _signs(directions), singular[:components].square(), alpha)


@torch.no_grad()
def two_sets(first: Tensor, second: Tensor, *, shrinkage: float | None = None) -> TwoSets:
    """Show how far two sets of features are apart, such as those of pretraining and downstream images.

    The horizontal axis is the linear discriminant of the sets. The vertical axis is the direction of the largest
    variance within the sets among the directions that are uncorrelated with it. Both are fitted on the images of even
    index, and the images of odd index are returned, because LDA separates any two small sets that it is fitted on.

    Args:
        first: (N1, d) floating point, at least four rows.
        second: (N2, d) floating point, at least four rows.
        shrinkage: As in `linear_discriminant`.

    Raises:
        InputError: A shape is wrong, a value is not finite, or there are too few rows.
        ConfigError: `shrinkage` is out of range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> first, second = torch.randn(2, 100, 5, generator=generator)
        >>> two_sets(first, second + 10).separation, two_sets(first, second).separation < 0.7
        (1.0, True)
    """
    check_rows("first", first)
    check_rows("second", second, first.shape[1])
    for name, rows in (("first", first), ("second", second)):
        if len(rows) < 4:
            raise InputError(f"{name} has {len(rows)} rows, but half of them fit the picture: pass at least 4.")
    fitted = torch.cat([first[::2], second[::2]])
    classes = torch.tensor([0] * len(first[::2]) + [1] * len(second[::2]))
    axis = linear_discriminant(fitted, classes, components=1, shrinkage=shrinkage)
    means = _sums(fitted, classes, 2) / torch.bincount(classes)[:, None]
    within, _ = _within(fitted, classes, means)
    w = axis.directions[:, 0]
    # Coordinates uncorrelated with w'x within the sets: remove the direction S_w w.
    normal = torch.nn.functional.normalize(within @ w, dim=0)
    rest = torch.eye(len(w), dtype=torch.float64) - torch.outer(normal, normal)
    vertical = torch.linalg.eigh(rest @ within @ rest)[1][:, -1:]
    plane = axis._replace(directions=torch.cat([axis.directions, vertical * _signs(vertical)], 1))
    shown = plane.project(first[1::2]), plane.project(second[1::2])
    middle = plane.project(means).mean(0)[0]
    sign = 1.0 if plane.project(means)[1, 0] > middle else -1.0
    below, above = ((coordinates[:, 0] - middle) * sign for coordinates in shown)
    accuracy = (float((below < 0).double().mean()) + float((above > 0).double().mean())) / 2
    return TwoSets(*shown, separation=accuracy, shrinkage=axis.shrinkage)


def _sums(features: Tensor, classes: Tensor, size: int) -> Tensor:
    """Sums by class (C, d) float64 on the CPU."""
    sums = torch.zeros(size, features.shape[1], dtype=torch.float64, device=features.device)
    index = classes.to(features.device)
    for rows in chunks(len(features), 12 * features.shape[1]):
        sums.index_add_(0, index[rows], at_least_float32(features[rows]).double())
    return sums.cpu()


def _within(features: Tensor, classes: Tensor, means: Tensor) -> tuple[Tensor, float]:
    """Covariance within classes (d, d) float64 on the CPU, and the mean fourth power of the distance to the mean."""
    width = features.shape[1]
    product = torch.zeros(width, width, dtype=torch.float64, device=features.device)
    fourth = torch.zeros((), dtype=torch.float64, device=features.device)
    index, centers = classes.to(features.device), means.to(features.device)
    for rows in chunks(len(features), 24 * width):
        centered = features[rows].double() - centers[index[rows]]
        product.addmm_(centered.T, centered)
        fourth += centered.square().sum(1).square().sum()
    return product.cpu() / len(features), float(fourth) / len(features)


def _ledoit_wolf(covariance: Tensor, fourth: float, rows: int) -> float:
    """Shrinkage of least expected squared error, for a covariance (d, d) of centered rows."""
    width = len(covariance)
    total = float(covariance.square().sum())
    noise = (fourth - total) / rows
    distance = total - float(covariance.trace()) ** 2 / width
    return 1.0 if distance <= 0 else max(0.0, min(1.0, noise / distance))


def _signs(directions: Tensor) -> Tensor:
    """Signs (1, q) that make the largest entry of each column positive: equal inputs give equal pictures."""
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0)
