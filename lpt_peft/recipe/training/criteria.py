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
from lpt_peft.losses import (
    AGCLLoss,
    BalancedSoftmaxLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    LPTLoss,
    class_balanced_weights,
    dual_sampling_counts,
    query_regularizer,
)
from lpt_peft.output import AdapterOutput
from lpt_peft.recipe.settings import TrainSettings

Criterion = Callable[[AdapterOutput, Tensor, int], Tensor]


def build_criterion(settings: TrainSettings, epochs: int, labels: Sequence[int], head: CosineClassifier) -> Criterion:
    """Build the criterion named by the settings, for a single phase.

    Every loss but "lpt" is a mean over all images of a batch, plus the match term. Two of its inputs depend on the
    sampling: see `frequency_counts` and `sampled_weights`. Margins and noise of LDAM and A-GCL depend only on the
    number of training images.

    Args:
        settings: `loss`, `sampling`, `eta`, `tau` and `reweight_from` are used.
        epochs: Of the phase.
        labels: Class of every training image, as returned by `checks.check_data`.
        head: Its scale is used for the loss.
    """
    counts = torch.bincount(torch.as_tensor(labels), minlength=len(head.weight))
    if settings.loss == "lpt":
        return LPTLoss(counts, epochs, eta=settings.eta, scale=head.scale)
    build: dict[str, Callable[[], nn.Module]] = {
        "agcl": lambda: AGCLLoss(counts, scale=head.scale, reduction="none"),
        "cross_entropy": lambda: nn.CrossEntropyLoss(reduction="none"),
        "class_balanced": lambda: nn.CrossEntropyLoss(reduction="none"),
        "focal": lambda: FocalLoss(reduction="none"),
        "ldam": lambda: LDAMLoss(counts, scale=head.scale, reduction="none"),
        "balanced_softmax": lambda: BalancedSoftmaxLoss(frequency_counts(counts, settings), reduction="none"),
        "logit_adjusted": lambda: LogitAdjustedLoss(
            frequency_counts(counts, settings), tau=settings.tau, reduction="none"
        ),
    }
    start = 0 if settings.loss == "class_balanced" else settings.reweight_from
    return _BatchLoss(build[settings.loss](), None if start is None else sampled_weights(counts, settings), start or 0)


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


def frequency_counts(counts: Tensor, settings: TrainSettings) -> Tensor:
    """Counts proportional to the class shares in a batch, which logit adjustment corrects for.

    Half of a dual batch is class-balanced, so its shares are the mean of the training images' and `1 / C`.

    Args:
        counts: `(C,)` training images of each class.
        settings: `sampling` is used.
    """
    return dual_sampling_counts(counts) if settings.sampling == "dual" else counts


def sampled_weights(counts: Tensor, settings: TrainSettings) -> Tensor:
    """Class-balanced weights for batches of the settings' sampling: `weight_j * pi_j / share_j`.

    The weights of `class_balanced_weights` are for batches with the class shares `pi` of the training images. For a
    dual batch with the shares `(pi_j + 1 / C) / 2`, the factor keeps the expected loss of each class the same. Without
    it, rare classes would be weighted twice: by the sampler and by the loss.

    Args:
        counts: `(C,)` training images of each class.
        settings: `sampling` is used.
    """
    weights, sampled = class_balanced_weights(counts), frequency_counts(counts, settings)
    return weights * (counts / counts.sum()) / (sampled / sampled.sum())


class _BatchLoss(nn.Module):
    """Mean of a loss on logits plus 1 - mean cosine of the selected keys, which is the keys' only gradient."""

    weights: Tensor | None

    def __init__(self, loss: nn.Module, weights: Tensor | None, reweight_from: int) -> None:
        super().__init__()
        self.loss = loss
        self.reweight_from = reweight_from
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, output: AdapterOutput, target: Tensor, epoch: int) -> Tensor:
        """Scalar loss of `output.logits` (B, C) against `target` (B,)."""
        rows: Tensor = self.loss(output.logits, target)
        if self.weights is not None and epoch >= self.reweight_from:
            rows = rows * self.weights[target]
        loss = rows.mean()
        return loss + (1 - output.similarity).mean() if output.similarity.shape[1] else loss
