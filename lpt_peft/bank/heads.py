"""Cosine classifiers of the tasks, which have any number of classes.

A batch takes one product for each of its tasks. A single product for all images would need a copy (B, C, d) of class
vectors, which is too large for thousands of classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt_peft._numerics import at_least_float32, full_precision
from lpt_peft.checkpoint import PromptContent


class Head(NamedTuple):
    """Classifier of a task."""

    weight: Tensor
    """(C, feature_dim) class vectors, in the dtype of the prompt file."""
    norms: Tensor
    """(C,) float64; float32 on MPS."""
    scale: float
    """Scale of the logits."""

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.weight.nbytes + self.norms.nbytes


def head_of(content: PromptContent, device: torch.device) -> Head:
    """Return the classifier of a prompt file on a device."""
    weight = content.tensors["head.weight"].to(device)
    wide = torch.float32 if device.type == "mps" else torch.float64
    norms = at_least_float32(weight).to(wide).norm(dim=-1).clamp(min=1e-12)  # the limit of F.normalize
    return Head(weight, norms, content.config.logit_scale)


def classify(features: Tensor, slots: Sequence[int], heads: Mapping[int, Head]) -> Tensor:
    """Compute the logits of a batch.

    Args:
        features: (B, feature_dim).
        slots: Slot of each image; 0 for the plain model.
        heads: Classifiers of the other slots.

    Returns:
        (B, C) float32 or float64, C of the largest task of the batch; -inf beyond the classes of an image's task.
    """
    if len(heads) == 1 and 0 not in slots:
        return _logits(features, heads[slots[0]])
    # Images in the order of their slots, so that those of a task are neighbors.
    order = sorted(range(len(slots)), key=slots.__getitem__)
    place = torch.tensor([order, sorted(order, key=order.__getitem__)]).to(features.device)
    sorted_features, answers = features[place[0]], []
    for slot in dict.fromkeys(slots[row] for row in order):
        part, sorted_features = sorted_features.tensor_split([slots.count(slot)])
        answers.append(_logits(part, heads[slot]) if slot else at_least_float32(part)[:, :0])
    width = max(answer.shape[1] for answer in answers)
    dtype = max((answer.dtype for answer in answers), key=lambda dtype: dtype.itemsize)
    padded = [F.pad(answer.to(dtype), (0, width - answer.shape[1]), value=-torch.inf) for answer in answers]
    return torch.cat(padded)[place[1]]


def cosines_with(features: Tensor, weight: Tensor, norms: Tensor) -> Tensor:
    """Cosines (B, C), float32 or float64, of features (B, d) with class vectors (C, d) of known norms (C,)."""
    with full_precision(features.device.type):
        wide = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
        return F.linear(F.normalize(features.to(wide), dim=-1), weight.to(wide)) / norms.to(wide)


def _logits(features: Tensor, head: Head) -> Tensor:
    return head.scale * cosines_with(features, head.weight, head.norms)
