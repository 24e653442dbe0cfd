"""Logit-adjusted cross-entropy (`logit_adjusted_loss`, `LogitAdjustedLoss`) and adjustment after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt_peft.errors import InputError
from lpt_peft.losses.agcl_definition import LOGIT_LIMIT, is_distribution
from lpt_peft.losses.base import ClassCountsLoss, compute_delta
from lpt_peft.losses.checks import (
    Reduction,
    check_batch,
    check_settings,
    checked_class_counts,
    counts_for_batch,
    loss_dtype,
    reduce_rows,
)

_NO_LABEL = torch.iinfo(torch.int64).min  # ignore_index of torch, whose default -100 would hide unlabeled rows


def logit_adjusted_loss(
    logits: Tensor,
    target: Tensor,
    class_counts: Sequence[int] | Mapping[int, int] | Tensor,
    *,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the logit-adjusted cross-entropy of Menon et al., ICLR 2021, arXiv 2007.07314.

    With `pi_j` the share of class j in the training images and `a = label_smoothing`:

        p    = softmax(logits + tau * log pi)
        loss = - sum_j ((1 - a) * target_j + a / C) * log p_j

    Without adjustment, the logits learn the class frequencies of the training images. With `tau = 1`, the adjustment
    accounts for them, so that the logits are those of a classifier for balanced classes. The logits of any classifier
    can be used. To adjust the predictions of a model that was trained with cross-entropy instead, use `adjust_logits`.
    For batches of `DualSampler`, `pi` is the mean of the class shares and `1 / C`: pass `dual_sampling_counts`.

    The loss is computed in float32 or float64, also under autocast. It is linear in `target`. Logits are clamped to
    +-1e18; NaN logits give NaN without an error.

    Args:
        logits: `(B, C)`, any floating dtype.
        target: `(B,)` class indices of any integer dtype, or `(B, C)` probabilities. Invalid values are handled as in
            `agcl_loss`.
        class_counts: `(C,)` integers of at least 1: training images of each class; or a mapping from label to count.
        tau: Strength of the adjustment, at least 0; 0 gives cross-entropy.
        label_smoothing: Fraction `a` of the target distribution that is uniform, 0 to 1.
        reduction: "mean" over the batch, "sum" or "none".

    Returns:
        A scalar, or `(B,)` for reduction "none"; float64 where the logits are, else float32.

    Raises:
        InputError: Counts, labels or shapes do not follow the rules above.
        ConfigError: A setting is out of its range.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> logit_adjusted_loss(logits, torch.tensor([1]), class_counts=[90, 10]).exp()  # 1 / pi_1
        tensor(10.)
    """
    check_settings(reduction, tau=tau, label_smoothing=label_smoothing)
    counts = counts_for_batch(logits, target, class_counts)
    delta = compute_delta(counts, loss_dtype(logits), normalize=False)
    return reduce_rows(_rows(logits, target, tau * delta, label_smoothing), reduction)


class LogitAdjustedLoss(ClassCountsLoss):
    """Logit-adjusted cross-entropy as a module; see `logit_adjusted_loss`.

    The class counts are a non-persistent buffer: `.to(device)` moves them, `.half()` leaves them exact. Every setting
    is an attribute that can be assigned later; the new value is checked.

    Args:
        class_counts: `(C,)` integers of at least 1: training images of each class; or a mapping from label to count.
        tau: Strength of the adjustment, at least 0.
        label_smoothing: Fraction of the target distribution that is uniform.
        reduction: "mean" over the batch, "sum" or "none".

    Raises:
        InputError: A class count is not an integer of at least 1; the message names the class.
        ConfigError: A setting is out of its range.

    Example:
        >>> criterion = LogitAdjustedLoss(class_counts={0: 90, 1: 10})
        >>> criterion(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).exp()
        tensor(10.)
    """

    _SETTINGS: ClassVar[tuple[str, ...]] = ("tau", "label_smoothing", "reduction")

    def __init__(
        self,
        class_counts: Sequence[int] | Mapping[int, int] | Tensor,
        *,
        tau: float = 1.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_counts)
        self.tau = tau
        self.label_smoothing = label_smoothing
        self.reduction: Reduction = reduction
        self._update_buffers()

    if TYPE_CHECKING:  # nn.Module's own __call__ returns Any

        def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
            """See `forward`."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of `logits (B, C)` for `target`; see `logit_adjusted_loss`."""
        check_batch(logits, target, None, self.class_counts)
        offset = self.tau * self._class_values_in(loss_dtype(logits))
        return reduce_rows(_rows(logits, target, offset, self.label_smoothing), self.reduction)


def adjust_logits(
    logits: Tensor, class_counts: Sequence[int] | Mapping[int, int] | Tensor, *, tau: float = 1.0
) -> Tensor:
    """Subtract `tau * log(pi_j / pi_max)` from logits: post-hoc logit adjustment, Menon et al., arXiv 2007.07314.

    It is for models trained with cross-entropy, whose logits include the class frequencies of the training images. A
    loss that accounts for them, such as `logit_adjusted_loss` or A-GCL, needs no adjustment.

    Args:
        logits: `(..., C)`, any floating dtype.
        class_counts: `(C,)` integers of at least 1: training images of each class; or a mapping from label to count.
        tau: Strength of the adjustment, at least 0.

    Returns:
        Adjusted logits `(..., C)`: float64 where `logits` are, else float32. Those of the most frequent class are
        unchanged; softmax does not depend on the common offset.

    Raises:
        InputError: Counts or shapes do not follow the rules above.
        ConfigError: `tau` is out of its range.

    Example:
        >>> adjust_logits(torch.tensor([[1.0, 0.0]]), class_counts=[90, 10])
        tensor([[1.0000, 2.1972]])
    """
    check_settings(tau=tau)
    counts = checked_class_counts(class_counts)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.shape[-1:] != counts.shape:
        found = (
            f"{logits.dtype} of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        )
        raise InputError(f"logits must be floating point (..., {len(counts)}), a column per class count, not {found}.")
    dtype = loss_dtype(logits)
    return logits.to(dtype) + tau * compute_delta(counts.to(logits.device), dtype, normalize=False)


def _rows(logits: Tensor, target: Tensor, offset: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy `(B,)` of the logits minus `offset (C,)`, which is `tau * log(n_max / n_j)`."""
    adjusted = logits.to(offset.dtype).clamp(-LOGIT_LIMIT, LOGIT_LIMIT) - offset
    options = {"label_smoothing": label_smoothing, "reduction": "none"}
    if not target.is_floating_point():
        return F.cross_entropy(adjusted, target.long(), ignore_index=_NO_LABEL, **options)  # type: ignore[arg-type]
    rows = F.cross_entropy(adjusted, target.to(offset.dtype), **options)  # type: ignore[arg-type]
    return rows * torch.where(is_distribution(target), 1.0, torch.nan)
