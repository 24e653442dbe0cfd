"""Class-balanced loss (effective number of samples): weights, `class_balanced_loss` and `ClassBalancedLoss`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lpt_peft.losses.base import ClassCountsLoss
from lpt_peft.losses.checks import (
    Reduction,
    check_batch,
    check_settings,
    checked_class_counts,
    counts_for_batch,
    loss_dtype,
    reduce_rows,
)
from lpt_peft.losses.label_rows import label_rows


def class_balanced_weights(class_counts: Sequence[int] | Mapping[int, int] | Tensor, *, beta: float = 0.9999) -> Tensor:
    """Compute the class weights of Cui et al., CVPR 2019, arXiv 1901.05555.

        weight_j = C * e_j / sum_i e_i,   e_j = (1 - beta) / (1 - beta ** n_j)

    The inverse of `e_j` is the effective number of the `n_j` training images of class j. With `beta = 0`, all weights
    are 1; as beta approaches 1, they become proportional to `1 / n_j`.

    Args:
        class_counts: `(C,)` integers of at least 1: training images of each class; or a mapping from label to count.
        beta: From 0 to below 1. The paper tries 0.9, 0.99, 0.999 and 0.9999.

    Returns:
        Weights `(C,)`, float32, with sum C, on the device of the counts.

    Raises:
        InputError: A class count is not an integer of at least 1; the message names the class.
        ConfigError: `beta` is out of its range.

    Example:
        >>> class_balanced_weights([1000, 10], beta=0.9)
        tensor([0.7888, 1.2112])
    """
    check_settings(beta=beta)
    return _weights(checked_class_counts(class_counts), beta, torch.float32)


def dual_sampling_counts(class_counts: Sequence[int] | Mapping[int, int] | Tensor) -> Tensor:
    """Compute integers proportional to the class frequencies in batches of `DualSampler`.

    One half of a dual batch has the class shares `pi_j = n_j / N` of the training images, the other half has `1 / C`
    each. The share of class j in the batch is the mean of both, which is proportional to `C * n_j + N`.

    Logit adjustment and balanced softmax correct for the class frequencies of the batches that the loss gets. For a
    loss on a whole dual batch, pass them these counts in place of `class_counts`.

    Args:
        class_counts: `(C,)` integers of at least 1: training images of each class; or a mapping from label to count.

    Returns:
        Counts `(C,)`, int64.

    Raises:
        InputError: A class count is not an integer of at least 1; the message names the class.

    Example:
        >>> dual_sampling_counts([90, 10])  # shares 0.7 and 0.3
        tensor([280, 120])
    """
    counts = checked_class_counts(class_counts)
    return len(counts) * counts + counts.sum()


def class_balanced_loss(
    logits: Tensor,
    target: Tensor,
    class_counts: Sequence[int] | Mapping[int, int] | Tensor,
    *,
    beta: float = 0.9999,
    gamma: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the class-balanced cross-entropy or focal loss of Cui et al., CVPR 2019, arXiv 1901.05555.

        p    = softmax(logits)
        loss = - weight_y * (1 - p_y) ** gamma * log p_y

    with the weights of `class_balanced_weights`. With `gamma = 0`, this is weighted cross-entropy, except that the mean
    divides by the number of rows, not by the sum of the weights as `F.cross_entropy` does. The paper's focal variant
    has a sigmoid for each class; here it is a softmax, as in `focal_loss`.

    The weights assume that the batches have the class frequencies of the training images: do not combine the loss with
    a class-balanced sampler.

    Args:
        logits: `(B, C)`, any floating dtype.
        target: `(B,)` class indices of any integer dtype, or `(B, C)` probabilities, for which the loss is the
            expectation over labels drawn from them. Invalid values are handled as in `agcl_loss`.
        class_counts: `(C,)` integers of at least 1: training images of each class; or a mapping from label to count.
        beta: From 0 to below 1; 0 gives the loss without weights.
        gamma: Exponent of the focal loss, at least 0; 0 gives cross-entropy.
        reduction: "mean" over the batch, "sum" or "none".

    Returns:
        A scalar, or `(B,)` for reduction "none"; float64 where the logits are, else float32.

    Raises:
        InputError: Counts, labels or shapes do not follow the rules above.
        ConfigError: A setting is out of its range.

    Example:
        >>> class_balanced_loss(torch.zeros(1, 2), torch.tensor([1]), [1000, 10], beta=0.9)  # 1.2112 * log 2
        tensor(0.8395)
    """
    check_settings(reduction, beta=beta, gamma=gamma)
    counts = counts_for_batch(logits, target, class_counts)
    weights = _weights(counts, beta, loss_dtype(logits))
    return reduce_rows(label_rows(logits, target, gamma=gamma, class_weights=weights), reduction)


class ClassBalancedLoss(ClassCountsLoss):
    """Class-balanced loss as a module; see `class_balanced_loss`.

    The class counts are a non-persistent buffer: `.to(device)` moves them, `.half()` leaves them exact. Every setting
    is an attribute that can be assigned later; the new value is checked.

    Args:
        class_counts: `(C,)` integers of at least 1: training images of each class; or a mapping from label to count.
        beta: From 0 to below 1.
        gamma: Exponent of the focal loss, at least 0; 0 gives cross-entropy.
        reduction: "mean" over the batch, "sum" or "none".

    Raises:
        InputError: A class count is not an integer of at least 1; the message names the class.
        ConfigError: A setting is out of its range.

    Example:
        >>> criterion = ClassBalancedLoss(class_counts=[1000, 10], beta=0.9)
        >>> criterion(torch.zeros(1, 2), torch.tensor([1]))
        tensor(0.8395)
    """

    _SETTINGS: ClassVar[tuple[str, ...]] = ("beta", "gamma", "reduction")
    _DERIVED_FROM: ClassVar[tuple[str, ...]] = ("beta",)

    def __init__(
        self,
        class_counts: Sequence[int] | Mapping[int, int] | Tensor,
        *,
        beta: float = 0.9999,
        gamma: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_counts)
        self.beta = beta
        self.gamma = gamma
        self.reduction: Reduction = reduction
        self._update_buffers()

    def _compute_class_values(self, dtype: torch.dtype) -> Tensor:
        return _weights(self.class_counts, self.beta, dtype)

    if TYPE_CHECKING:  # nn.Module's own __call__ returns Any

        def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
            """See `forward`."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of `logits (B, C)` for `target`; see `class_balanced_loss`."""
        check_batch(logits, target, None, self.class_counts)
        weights = self._class_values_in(loss_dtype(logits))
        return reduce_rows(label_rows(logits, target, gamma=self.gamma, class_weights=weights), self.reduction)


def _weights(counts: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """Weights `(C,)` with sum C."""
    if beta == 0:
        return torch.ones_like(counts, dtype=dtype)
    inverse = -1 / torch.expm1(counts.to(dtype) * math.log(beta))  # accurate where beta is close to 1
    return len(counts) * inverse / inverse.sum()
