"""Losses that are a function of the label's log-odds: focal loss and LDAM, for class indices and for probabilities.

Not here: input validation (`checks.py`) and A-GCL, which also has terms of the other classes (`agcl_definition.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt_peft.losses.agcl_definition import LOGIT_LIMIT, is_distribution
from lpt_peft.losses.checks import loss_dtype


def label_rows(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 0.0,
    margins: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Compute `- w_y * (1 - p_y) ** gamma * log p_y` of each row, where p_y includes the margin of class y.

        log p_y = logsigmoid(o_y),   o_y = z_y - margins_y - log sum_{j != y} exp z_j

    For probabilities, the loss is the expectation over labels drawn from them. A row that is not a probability
    distribution has loss NaN.

    Args:
        logits: `(B, C)`, any floating dtype.
        target: `(B,)` integers, 0 to `C - 1`, or `(B, C)` probabilities.
        gamma: Exponent; 0 gives cross-entropy.
        margins: `(C,)`: subtracted from the logit of the label.
        class_weights: `(C,)`: factor of the loss of each label.

    Returns:
        `(B,)`, float64 where the logits are, else float32.
    """
    z = logits.to(loss_dtype(logits)).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    if target.is_floating_point():
        odds = _all_log_odds(z)
        target = target.to(z.dtype)
    else:
        target = target.long()
        odds = _log_odds(z, target[:, None])
    if margins is not None:
        odds = odds - _of_labels(margins.to(z.dtype), target)
    # 1 - p_y is 0 once p_y rounds to 1, and its power then has no finite gradient. Log-odds avoid this.
    loss = -F.logsigmoid(odds)
    if gamma:
        loss = loss * (gamma * F.logsigmoid(-odds)).clamp_min(-80.0).exp()  # denormal numbers are slow on a CPU
    if class_weights is not None:
        loss = loss * _of_labels(class_weights.to(z.dtype), target)
    if not target.is_floating_point():
        return loss.squeeze(1)
    return (target * loss).sum(1) * torch.where(is_distribution(target), 1.0, torch.nan)


def _of_labels(values: Tensor, target: Tensor) -> Tensor:
    """Values `(C,)` of the labels as `(B, 1)`, or of all classes as `(C,)` if the target is probabilities."""
    return values if target.is_floating_point() else values[target][:, None]


def _log_odds(z: Tensor, label: Tensor) -> Tensor:
    """Log-odds `(B, 1)` of `label (B, 1)`."""
    return z.gather(1, label) - z.scatter(1, label, -2 * LOGIT_LIMIT).logsumexp(1, keepdim=True)


def _all_log_odds(z: Tensor) -> Tensor:
    """Log-odds `(B, C)` of every class, in O(C) per row.

    The sum without class y is the total times 1 - p_y, which is accurate unless y is the most probable class.
    """
    most_probable = z.argmax(1, keepdim=True)
    rest = torch.log1p(-z.softmax(1).clamp_max(0.5))
    return (z - z.logsumexp(1, keepdim=True) - rest).scatter(1, most_probable, _log_odds(z, most_probable))
