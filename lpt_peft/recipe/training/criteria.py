"""Criteria for the losses named by `TrainSettings.loss`: callables of (output, target, epoch).

Any callable of this form can be used instead. Not here: the losses themselves (`lpt_peft.losses`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lpt_peft.heads import CosineClassifier
from lpt_peft.losses import AGCLLoss, LPTLoss
from lpt_peft.output import AdapterOutput
from lpt_peft.recipe.settings import TrainSettings

Criterion = Callable[[AdapterOutput, Tensor, int], Tensor]


def build_criterion(settings: TrainSettings, epochs: int, labels: Sequence[int], head: CosineClassifier) -> Criterion:
    """Build the criterion named by the settings, for a single phase.

    Args:
        settings: `loss` and `eta` are used.
        epochs: Of the phase.
        labels: Class of every training image, as returned by `checks.check_data`.
        head: Its scale is used for the loss.
    """
    counts = torch.bincount(torch.as_tensor(labels), minlength=len(head.weight))
    if settings.loss == "lpt":
        return LPTLoss(counts, epochs, eta=settings.eta, scale=head.scale)
    if settings.loss == "agcl":
        return _WithMatchTerm(AGCLLoss(counts, scale=head.scale))
    return _WithMatchTerm(nn.CrossEntropyLoss())


class _WithMatchTerm(nn.Module):
    """A loss on logits plus 1 - mean cosine of the selected keys, which is the keys' only gradient."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: AdapterOutput, target: Tensor, epoch: int) -> Tensor:
        """Scalar loss of `output.logits` (B, C) against `target` (B,)."""
        loss: Tensor = self.loss(output.logits, target)
        return loss + (1 - output.similarity).mean() if output.similarity.shape[1] else loss
