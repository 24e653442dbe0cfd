"""AdapterOutput: everything a forward pass of the adapter computes for a batch; and what transformers expects of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lpt_peft.errors import StateError

if TYPE_CHECKING:
    from transformers.modeling_outputs import ImageClassifierOutput


class AdapterOutput(NamedTuple):
    """Everything a forward pass computes for a batch."""

    logits: Tensor
    """(B, C) float32 or float64, `logit_scale * cosine`."""
    features: Tensor
    """(B, d) what the head sees, before dropout."""
    query: Tensor
    """(B, d) the pooled feature under shared prompts alone; no gradient in phase "group"."""
    similarity: Tensor
    """(B, k) cosine of query and chosen keys; (B, 0) in phase "shared"."""
    groups: Tensor
    """(B, k) int64 chosen groups; (B, 0) in phase "shared"."""


def cross_entropy_with_match(output: AdapterOutput, labels: Tensor) -> Tensor:
    """Cross-entropy, and in phase "group" the match term `1 - mean similarity`, from which the keys learn.

    Args:
        output: Of a batch of `B` images.
        labels: Classes (B,) int64.

    Returns:
        The loss, a scalar in the logits' dtype.
    """
    loss = F.cross_entropy(output.logits, labels)
    return loss + (1 - output.similarity.mean()) if output.similarity.shape[1] else loss


def image_classifier_output(logits: Tensor, loss: Tensor | None) -> ImageClassifierOutput:
    """The output class of transformers for image classification.

    Raises:
        StateError: transformers is not installed.
    """
    try:
        from transformers.modeling_outputs import ImageClassifierOutput  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise StateError(
            "A call with pixel_values= or labels= answers with transformers' ImageClassifierOutput, and transformers "
            'cannot be imported: pip install "lpt_peft[transformers]", or call adapter(images) and get the logits.'
        ) from error
    return ImageClassifierOutput(loss=loss, logits=logits)
