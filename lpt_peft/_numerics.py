"""Cosine similarity in full precision: what the head and the prompt pool both rest on.

Not a general distance library: one function, computed in float32 or wider whatever comes in, because a
logit scale of 20 turns the rounding of a bfloat16 cosine into noise.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Context in which autocast does not lower precision; nothing at all where autocast is off."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def at_least_float32(tensor: Tensor) -> Tensor:
    """float64 stays float64, everything else becomes float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cosine(rows: Tensor, columns: Tensor) -> Tensor:
    """Cosine of every pair: (B, d) and (C, d) floating point to (B, C), float32 or float64."""
    with full_precision(rows.device.type):
        rows, columns = at_least_float32(rows), at_least_float32(columns)
        wide = torch.promote_types(rows.dtype, columns.dtype)
        return F.linear(F.normalize(rows.to(wide), dim=-1), F.normalize(columns.to(wide), dim=-1))
