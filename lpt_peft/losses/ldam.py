"""Label-distribution-aware margin loss (LDAM): `ldam_loss` and `LDAMLoss`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lpt_peft.losses.base import ClassCountsLoss
from lpt_peft.losses.checks import (
    Reduction,
    check_batch,
    check_settings,
    checked_class_weights,
    counts_for_batch,
    loss_dtype,
    reduce_rows,
)
from lpt_peft.losses.label_rows import label_rows


def ldam_loss(
    logits: Tensor,
    target: Tensor,
    class_counts: Sequence[int] | Mapping[int, int] | Tensor,
    *,
    scale: float = 20.0,
    max_margin: float = 0.5,
    class_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the label-distribution-aware margin loss (LDAM) of Cao et al., NeurIPS 2019, arXiv 1906.07413.

    With `s = scale` and `n_j` training images of class j:

        margin_j = max_margin * (n_min / n_j) ** (1/4)
        z_j      = logits_j - s * margin_j * [j = y]
        loss     = - w_y * log softmax(z)_y

    Rare classes get the larger margins; the rarest class gets `max_margin`. The loss is for the logits of a cosine
    classifier, `s * cos`. The paper combines it with class weights in the last epochs (deferred reweighting, DRW):
    assign `criterion.class_weights = class_balanced_weights(class_counts)` there.

    The loss is computed in float32 or float64, also under autocast. Loss and gradient are finite for all finite logits.
    Logits are clamped to +-1e18; NaN logits give NaN without an error.

    Args:
        logits: `(B, C)`, any floating dtype: `scale` times the cosines.
        target: `(B,)` class indices of any integer dtype, or `(B, C)` probabilities, for which the loss is the
            expectation over labels drawn from them. Invalid values are handled as in `agcl_loss`.
        class_counts: `(C,)` integers of at least 1: training images of each class; or a mapping from label to count.
        scale: Scale `s` of the cosine classifier. The paper uses 30.
        max_margin: Margin of the rarest class, as a cosine.
        class_weights: `(C,)` factors `w` of at least 0; None means 1. The mean divides by the number of rows, not by
            the sum of the weights as `F.cross_entropy` does.
        reduction: "mean" over the batch, "sum" or "none".

    Returns:
        A scalar, or `(B,)` for reduction "none"; float64 where the logits are, else float32.

    Raises:
        InputError: Counts, weights, labels or shapes do not follow the rules above.
        ConfigError: A setting is out of its range.

    Example:
        >>> logits = 20 * torch.tensor([[0.6, 0.1], [0.1, 0.6]])
        >>> ldam_loss(logits, torch.tensor([0, 1]), class_counts=[1600, 100], reduction="none")  # margins 0.25, 0.5
        tensor([0.0067, 0.6931])
    """
    check_settings(reduction, scale=scale, max_margin=max_margin)
    if class_weights is not None:
        class_weights = checked_class_weights(class_weights)
    counts = counts_for_batch(logits, target, class_counts, class_weights=class_weights)
    margins = scale * _margins(counts, max_margin, loss_dtype(logits))
    return reduce_rows(label_rows(logits, target, margins=margins, class_weights=class_weights), reduction)


class LDAMLoss(ClassCountsLoss):
    """LDAM as a module; see `ldam_loss`.

    Class counts and class weights are non-persistent buffers: `.to(device)` moves them, `.half()` leaves them exact.
    They and every setting are attributes that can be assigned later; the new value is checked.

    Args:
        class_counts: `(C,)` integers of at least 1: training images of each class; or a mapping from label to count.
        scale: Scale of the cosine classifier.
        max_margin: Margin of the rarest class, as a cosine.
        class_weights: `(C,)` factors of at least 0; None means 1.
        reduction: "mean" over the batch, "sum" or "none".

    Raises:
        InputError: A class count is not an integer of at least 1, or a class weight is negative or not finite.
        ConfigError: A setting is out of its range.

    Example:
        >>> criterion = LDAMLoss(class_counts={0: 1600, 1: 100})
        >>> criterion(20 * torch.tensor([[0.1, 0.6]]), torch.tensor([1]))
        tensor(0.6931)
    """

    _SETTINGS: ClassVar[tuple[str, ...]] = ("scale", "max_margin", "reduction")
    _DERIVED_FROM: ClassVar[tuple[str, ...]] = ("max_margin",)
    class_weights: Tensor | None

    def __init__(
        self,
        class_counts: Sequence[int] | Mapping[int, int] | Tensor,
        *,
        scale: float = 20.0,
        max_margin: float = 0.5,
        class_weights: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_counts)
        self.scale = scale
        self.max_margin = max_margin
        self.reduction: Reduction = reduction
        self.register_buffer("class_weights", None, persistent=False)
        self.class_weights = class_weights
        self._update_buffers()

    def _compute_class_values(self, dtype: torch.dtype) -> Tensor:
        return _margins(self.class_counts, self.max_margin, dtype)

    if TYPE_CHECKING:  # nn.Module's own __call__ returns Any

        def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
            """See `forward`."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of `logits (B, C)` for `target`; see `ldam_loss`."""
        check_batch(logits, target, None, self.class_counts, self.class_weights)
        margins = self.scale * self._class_values_in(loss_dtype(logits))
        return reduce_rows(
            label_rows(logits, target, margins=margins, class_weights=self.class_weights), self.reduction
        )


def _margins(counts: Tensor, max_margin: float, dtype: torch.dtype) -> Tensor:
    """Margins `(C,)` as cosines; the rarest class has `max_margin`."""
    return max_margin * (counts.min().to(dtype) / counts.to(dtype)) ** 0.25
