"""Masks, biases and rotary tables of blocks and attentions, extended by the rows of a prompt.

A prompt has no position: it is not rotated, its bias is 0, and all tokens may attend to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_COSINES, _SINES = ("rope_cos", "cos"), ("rope_sin", "sin")  # arguments that hold a rotary table (..., N, e)


def extend_arguments(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor, length: int
) -> dict[str, Any]:
    """Return the arguments after the tokens (B, N, d), by name, extended for `length` more tokens."""
    if not args and not kwargs:
        return {}
    count = tokens.shape[1]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    if named.pop("is_causal", False):  # takes precedence over a mask; every token attends to every prompt
        named["attn_mask"] = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
    return {name: _extend(name, value, count, length) for name, value in named.items()}


def _extend(name: str, value: Any, count: int, length: int) -> Any:
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
        return _more_rows(value[0], length, 1.0), _more_rows(value[1], length, 0.0)  # cosines and sines
    if not isinstance(value, Tensor):
        return value
    if name in _COSINES or name in _SINES:
        return _more_rows(value, length, float(name in _COSINES))
    if name == "rope":  # timm: sines and cosines in one table
        sines, cosines = value.chunk(2, dim=-1)
        return torch.cat([_more_rows(sines, length, 0.0), _more_rows(cosines, length, 1.0)], -1)
    if "mask" in name and value.ndim > 1 and value.shape[-1] == 1:  # one value for all tokens, but not for prompts
        value = value.expand(*value.shape[:-1], count)
    if value.shape[-1] != count:
        return value
    # Floating point masks and biases are added (0); others say which tokens may attend (1).
    rows = length if value.ndim > 1 and value.shape[-2] == count else 0
    return F.pad(
        value, (0, length, 0, rows) if value.ndim > 1 else (0, length), value=float(not value.is_floating_point())
    )


def _more_rows(table: Tensor, length: int, fill: float) -> Tensor:
    """Append `length` rows of `fill` to a table (..., N, e)."""
    return torch.cat([table, table.new_full((*table.shape[:-2], length, table.shape[-1]), fill)], -2)
