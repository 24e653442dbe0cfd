"""Masks, biases and rotary tables of blocks and attentions, extended by the rows of a prompt.

A prompt has no position: it is not rotated, its bias is 0, and all tokens may attend to it, unless a mask excludes
tokens of it (`exclude_prompts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt_peft.errors import BackboneError

# Arguments of attentions that take a mask or bias (B or 1, 1 or h, N, N), added to the logits.
_MASKS = ("attn_mask", "attention_mask", "shared_rel_pos_bias")
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


def exclude_prompts(names: Sequence[str], context: dict[str, Any], tokens: Tensor, mask: Tensor) -> dict[str, Any]:
    """Return the extended arguments of an attention with a mask that excludes prompt tokens.

    Args:
        names: Names of the attention's arguments after the tokens.
        context: Arguments by name, extended for n more tokens.
        tokens: (B, N, d), without the prompt.
        mask: (B, n) bool, True for prompt tokens that may be attended to.

    Raises:
        BackboneError: The attention takes no mask, or has a mask that cannot be combined.
    """
    name = next((name for name in _MASKS if name in names), None)
    if name is None:
        raise BackboneError("This attention takes no mask, so images of a batch cannot have prompts of unequal length.")
    added = excluded_keys(tokens, mask)[:, None, None]
    given = context.get(name)
    if given is None:
        return {**context, name: added}
    if given.ndim != 4:
        raise BackboneError(
            f"This attention has a mask of shape {tuple(given.shape)}, which cannot be combined with a mask of the "
            "prompts: use images that need no mask."
        )
    if given.is_floating_point():
        return {**context, name: given + added.to(given.dtype)}
    return {**context, name: given.bool() & (added == 0)}


def excluded_keys(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return what is added to the attention logits of all keys (B, N + n): -inf for prompt tokens outside the mask."""
    excluded = torch.cat([mask.new_ones(*tokens.shape[:2]), mask], 1).logical_not()
    return torch.zeros(excluded.shape, dtype=tokens.dtype, device=tokens.device).masked_fill(excluded, -torch.inf)


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
