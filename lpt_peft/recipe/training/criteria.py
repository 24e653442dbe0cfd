"""The losses that `TrainSettings.loss` names, as criteria: functions of (output, target, epoch).

Any function of this form can take their place. Not here: the losses themselves (`lpt_peft.losses`).
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


def criterion_of(settings: TrainSettings, epochs: int, labels: Sequence[int], head: CosineClassifier) -> Criterion:
    """The criterion that the settings name, for one phase.

    Args:
        settings: `loss` and `eta` count.
        epochs: Of the phase.
        labels: Class of every training image, as `checks.check_data` wants them.
        head: Its scale is the loss's.
    """
    counts = torch.bincount(torch.as_tensor(labels), minlength=len(head.weight))
    if settings.loss == "lpt":
        return LPTLoss(counts, epochs, eta=settings.eta, scale=head.scale)
    if settings.loss == "agcl":
        return _Matched(AGCLLoss(counts, scale=head.scale))
    return _Matched(nn.CrossEntropyLoss())


class _Matched(nn.Module):
    """A loss on logits, and 1 - mean cosine of the chosen keys in phase "group", without which keys learn nothing."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: AdapterOutput, target: Tensor, epoch: int) -> Tensor:
        """The scalar loss of output.logits (B, C) against target (B,)."""
        loss: Tensor = self.loss(output.logits, target)
        return loss + (1 - output.similarity).mean() if output.similarity.shape[1] else loss
