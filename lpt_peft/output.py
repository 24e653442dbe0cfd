"""AdapterOutput: everything a forward pass of the adapter learnt about a batch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AdapterOutput(NamedTuple):
    """Everything a forward pass learnt about a batch."""

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
