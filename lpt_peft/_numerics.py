"""Cosine similarity in float32 or wider, for the classifier and the prompt pool.

With a logit scale of 20, the rounding error of a bfloat16 cosine would become noise in the logits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Context that turns autocast off, if it is on."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast to float32, unless the tensor is float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cosine(rows: Tensor, columns: Tensor) -> Tensor:
    """Cosine of all pairs: (B, d) and (C, d) floating point to (B, C), float32 or float64."""
    with full_precision(rows.device.type):
        rows, columns = at_least_float32(rows), at_least_float32(columns)
        wide = torch.promote_types(rows.dtype, columns.dtype)
        return F.linear(F.normalize(rows.to(wide), dim=-1), F.normalize(columns.to(wide), dim=-1))
