"""Focal loss: `focal_loss` and `FocalLoss`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lpt_peft.losses.base import CheckedLoss
from lpt_peft.losses.checks import Reduction, check_batch, check_settings, checked_class_weights, reduce_rows
from lpt_peft.losses.label_rows import label_rows


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    class_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the focal loss of Lin et al., ICCV 2017, arXiv 1708.02002, for a softmax over classes.

        p    = softmax(logits)
        loss = - w_y * (1 - p_y) ** gamma * log p_y

    The factor reduces the loss of images that are already classified well. It does not depend on class frequencies.
    With `gamma = 0`, the loss is cross-entropy. `torchvision.ops.sigmoid_focal_loss` has another definition: a sigmoid
    for each class, for detection. Both agree for two classes with logits (0, x).

    The loss is computed in float32 or float64, also under autocast. Loss and gradient are finite for all finite logits.
    Logits are clamped to +-1e18; NaN logits give NaN without an error.

    Args:
        logits: `(B, C)`, any floating dtype.
        target: `(B,)` class indices of any integer dtype, or `(B, C)` probabilities, for which the loss is the
            expectation over labels drawn from them. Invalid values are handled as in `agcl_loss`.
        gamma: Exponent, at least 0.
        class_weights: `(C,)` factors `w` of at least 0, see `class_balanced_weights`; None means 1. This is the paper's
            alpha. The mean divides by the number of rows, not by the sum of the weights as `F.cross_entropy` does.
        reduction: "mean" over the batch, "sum" or "none".

    Returns:
        A scalar, or `(B,)` for reduction "none"; float64 where the logits are, else float32.

    Raises:
        InputError: Labels, weights or shapes do not follow the rules above.
        ConfigError: A setting is out of its range.

    Example:
        >>> import torch
        >>> logits = torch.log(torch.tensor([[0.9, 0.1]]))
        >>> focal_loss(logits, torch.tensor([0]))  # (1 - 0.9) ** 2 * -log 0.9
        tensor(0.0011)
    """
    check_settings(reduction, gamma=gamma)
    if class_weights is not None:
        class_weights = checked_class_weights(class_weights)
    check_batch(logits, target, None, None, class_weights)
    return reduce_rows(label_rows(logits, target, gamma=gamma, class_weights=class_weights), reduction)


class FocalLoss(CheckedLoss):
    """Focal loss as a module; see `focal_loss`.

    The class weights are a non-persistent buffer: `.to(device)` moves them, `.half()` leaves them exact. They and every
    setting are attributes that can be assigned later; the new value is checked.

    Args:
        gamma: Exponent, at least 0.
        class_weights: `(C,)` factors of at least 0; None means 1.
        reduction: "mean" over the batch, "sum" or "none".

    Raises:
        InputError: A class weight is negative or not finite; the message names the class.
        ConfigError: A setting is out of its range.

    Example:
        >>> import torch
        >>> criterion = FocalLoss(gamma=0.0, class_weights=torch.tensor([0.5, 2.0]))
        >>> criterion(torch.zeros(1, 2), torch.tensor([1]))  # 2 * log 2
        tensor(1.3863)
    """

    _SETTINGS: ClassVar[tuple[str, ...]] = ("gamma", "reduction")
    class_weights: Tensor | None

    def __init__(
        self, gamma: float = 2.0, *, class_weights: Tensor | None = None, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.reduction: Reduction = reduction
        self.register_buffer("class_weights", None, persistent=False)
        self.class_weights = class_weights

    if TYPE_CHECKING:  # nn.Module's own __call__ returns Any

        def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
            """See `forward`."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of `logits (B, C)` for `target`; see `focal_loss`."""
        check_batch(logits, target, None, None, self.class_weights)
        rows = label_rows(logits, target, gamma=self.gamma, class_weights=self.class_weights)
        return reduce_rows(rows, self.reduction)
