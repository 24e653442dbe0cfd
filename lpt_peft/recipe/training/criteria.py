"""Criteria for the losses named by `TrainSettings.loss`: callables of (output, target, epoch).

Any callable of this form can be used instead. Not here: the losses themselves (`lpt_peft.losses`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lpt_peft.errors import ConfigError
from lpt_peft.heads import CosineClassifier
from lpt_peft.losses import AGCLLoss, LPTLoss, query_regularizer
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


def add_query_regularizer(criterion: Criterion, settings: TrainSettings, model: nn.Module) -> Criterion:
    """Add `settings.query_regularizer` times `query_regularizer` to a criterion, in phases with groups.

    Raises:
        ConfigError: The model has no keys, its query is the final feature, or its features have another width.
    """
    if not settings.query_regularizer:
        return criterion
    config: Any = getattr(model, "prompt_config", None)
    if getattr(config, "query", None) != "block_k":
        raise ConfigError(
            f'query_regularizer={settings.query_regularizer:g} needs an adapter with query="block_k": the final query '
            'is a final feature already. Wrap the ViT with query="block_k" (--query block_k), or set it to 0.'
        )
    if config.feature_dim != config.key_dim:
        raise ConfigError(
            f"query_regularizer={settings.query_regularizer:g} compares the same keys with queries of width "
            f"{config.key_dim} and features of width {config.feature_dim}, which needs equal widths. Set it to 0."
        )

    def regularized(output: AdapterOutput, target: Tensor, epoch: int) -> Tensor:
        loss = criterion(output, target, epoch)
        if not output.similarity.shape[1]:
            return loss
        keys = model.get_parameter("pool.keys")
        return loss + settings.query_regularizer * query_regularizer(output.query, output.features, keys)

    return regularized


class _WithMatchTerm(nn.Module):
    """A loss on logits plus 1 - mean cosine of the selected keys, which is the keys' only gradient."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: AdapterOutput, target: Tensor, epoch: int) -> Tensor:
        """Scalar loss of `output.logits` (B, C) against `target` (B,)."""
        loss: Tensor = self.loss(output.logits, target)
        return loss + (1 - output.similarity).mean() if output.similarity.shape[1] else loss
