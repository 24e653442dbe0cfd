"""Balanced softmax: `balanced_softmax_loss` and `BalancedSoftmaxLoss`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from lpt_peft.losses.checks import Reduction
from lpt_peft.losses.logit_adjusted import LogitAdjustedLoss, logit_adjusted_loss


def balanced_softmax_loss(
    logits: Tensor,
    target: Tensor,
    class_counts: Sequence[int] | Mapping[int, int] | Tensor,
    *,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the balanced softmax cross-entropy of Ren et al., NeurIPS 2020, arXiv 2007.10740.

        p_j  = n_j * exp(logits_j) / sum_i n_i * exp(logits_i)
        loss = - log p_y

    This is `logit_adjusted_loss` with `tau = 1`, which describes arguments, results and errors.

    Example:
        >>> import torch
        >>> balanced_softmax_loss(torch.zeros(1, 2), torch.tensor([1]), class_counts=[90, 10]).exp()
        tensor(10.)
    """
    return logit_adjusted_loss(logits, target, class_counts, label_smoothing=label_smoothing, reduction=reduction)


class BalancedSoftmaxLoss(LogitAdjustedLoss):
    """Balanced softmax as a module: `LogitAdjustedLoss` with `tau = 1`; see `balanced_softmax_loss`.

    Args:
        class_counts: `(C,)` integers of at least 1: training images of each class; or a mapping from label to count.
        label_smoothing: Fraction of the target distribution that is uniform.
        reduction: "mean" over the batch, "sum" or "none".

    Raises:
        InputError: A class count is not an integer of at least 1; the message names the class.
        ConfigError: A setting is out of its range.

    Example:
        >>> import torch
        >>> BalancedSoftmaxLoss([90, 10])(torch.zeros(1, 2), torch.tensor([1])).exp()
        tensor(10.)
    """

    _SETTINGS: ClassVar[tuple[str, ...]] = ("label_smoothing", "reduction")

    def __init__(
        self,
        class_counts: Sequence[int] | Mapping[int, int] | Tensor,
        *,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_counts, label_smoothing=label_smoothing, reduction=reduction)
