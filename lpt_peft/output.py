"""Outputs of the adapter: its own named tuple, and the output class of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from lpt_peft.errors import InputError, StateError

if TYPE_CHECKING:
    from transformers.modeling_outputs import ImageClassifierOutput


_SUM_TOLERANCE = 1e-2  # rounding of bfloat16 over many classes


class AdapterOutput(NamedTuple):
    """Everything that a forward pass computes for a batch."""

    logits: Tensor
    """(B, C) float32 or float64, `logit_scale * cosine`."""
    features: Tensor
    """(B, d) input of the classifier, before dropout."""
    query: Tensor
    """(B, key_dim) pooled feature under shared prompts alone, without a gradient in phase "group"; with
    `query="block_k"`, the normalized class token (or mean patch) that enters block `K + 1`, without a gradient."""
    similarity: Tensor
    """(B, k) cosine of query and selected keys; (B, 0) in phase "shared"."""
    groups: Tensor
    """(B, k) int64 selected groups; (B, 0) in phase "shared"."""


def cross_entropy_with_match(output: AdapterOutput, labels: Tensor) -> Tensor:
    """Cross-entropy, plus `1 - mean similarity` in phase "group", which trains the keys.

    Args:
        output: Of a batch of `B` images.
        labels: Classes (B,) int64, or probabilities (B, C).

    Returns:
        The loss, a scalar in the logits' dtype.

    Raises:
        InputError: The labels do not fit the logits. Values are checked on a CPU, outside torch.compile.
    """
    if torch.compiler.is_compiling():
        loss = F.cross_entropy(output.logits, labels)
    else:
        loss = _cross_entropy(output.logits, labels)
    return loss + (1 - output.similarity.mean()) if output.similarity.shape[1] else loss


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    try:
        loss = F.cross_entropy(logits, labels)
    except Exception as error:
        if (reason := explain_labels(logits, labels)) is not None:
            raise InputError(f"{reason} The loss reports: {error!s:.200}") from error
        raise
    if labels.is_floating_point() and labels.device.type == "cpu" and not is_functorch_wrapped_tensor(labels):
        sums = labels.detach().sum(1, dtype=torch.float64)
        invalid = ~((labels >= 0).all(1) & ((sums - 1).abs() <= _SUM_TOLERANCE))
        if invalid.any():
            row = int(invalid.nonzero()[0])
            raise InputError(
                f"labels[{row}] must be probabilities, but its smallest value is {labels[row].min().item():.4g} and "
                f"its sum is {sums[row].item():.4g}: pass scores through softmax(dim=1), and divide multi-label rows "
                "by their number of labels."
            )
    return loss


def explain_labels(logits: Tensor, labels: object) -> str | None:
    """Return why `labels` cannot be the labels of `logits` (B, C) in a cross-entropy, with a remedy, or None."""
    rows, classes = logits.shape
    if labels is None:
        return "labels is None: the batch has no labels, so pass those of a labelled data set."
    if isinstance(labels, Mapping):
        return f"labels is a {type(labels).__name__}: pass the tensor of labels in it."
    if isinstance(labels, (list, tuple)) and any(isinstance(item, Tensor) and item.ndim for item in labels):
        return (
            f"labels is a {type(labels).__name__} of tensors: pass a single tensor, for Mixup or CutMix the "
            f"probabilities ({rows}, {classes})."
        )
    if not isinstance(labels, Tensor):
        return f"labels is a {type(labels).__name__}: pass torch.tensor(labels)."
    rule = f"labels must be class indices ({rows},) int64 or probabilities ({rows}, {classes}) floating point"
    found = f"{rule}, not {labels.dtype} of shape {tuple(labels.shape)}"
    reason = None
    if labels.device != logits.device:
        reason = f"labels is on {labels.device} and logits are on {logits.device}: pass labels.to(logits.device)."
    elif labels.ndim == 2 and labels.shape[1] == 1 < classes:
        reason = f"{found}: pass labels.squeeze(1)."
    elif labels.shape == (rows, classes):
        reason = None if labels.is_floating_point() else f"{found}: pass labels.float() if it is one-hot."
    elif labels.shape != (rows,):
        reason = f"{found}: pass the labels of the same batch as the logits, a label for each row."
    elif labels.dtype not in {torch.int64, torch.uint8}:
        reason = f"{found}: pass labels.long() if the values are class indices."
    elif labels.device.type == "cpu" and rows:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            reason = f"labels has values from {low} to {high}, and the classes are 0 to {classes - 1}."
    return reason


def image_classifier_output(logits: Tensor, loss: Tensor | None) -> ImageClassifierOutput:
    """Return transformers' output for image classification.

    Raises:
        StateError: transformers is not installed.
    """
    try:
        from transformers.modeling_outputs import ImageClassifierOutput  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise StateError(
            "A call with pixel_values= or labels= returns transformers' ImageClassifierOutput, and transformers "
            'cannot be imported: pip install "lpt_peft[transformers]", or call adapter(images), which returns logits.'
        ) from error
    return ImageClassifierOutput(loss=loss, logits=logits)
