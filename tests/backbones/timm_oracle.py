"""Oracle of timm's ViTs with positions inside the blocks: prompt tokens come first and have no position.

Token concatenation as in `tests/oracle.py`, extended to rotary embeddings (prompts count as prefix tokens,
which are not rotated), relative-position biases (0 for rows and columns of prompts) and masks (prompts are
visible). It changes the original modules by hooks and does not use lpt_peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pad_table(table: Tensor, n: int) -> Tensor:
    """A mask or bias (..., N or 1, N) with `n` rows and columns of "allowed" in front."""
    allowed = True if table.dtype == torch.bool else 0.0
    return F.pad(table, (n, 0) if table.shape[-2] == 1 else (n, 0, n, 0), value=allowed)


@contextmanager
def prepended_prompts(
    blocks: Sequence[nn.Module], prompts: Sequence[Tensor], *, carried: bool = False
) -> Iterator[None]:
    """Let block i run on `[prompts[i]; x]`, (n, d) or (B, n, d), and return the last N tokens; a context.

    With `carried`, prompts[0] enters the first block alone and passes through all of them.
    """
    with ExitStack() as stack:
        for layer, (block, prompt) in enumerate(zip(blocks, prompts, strict=True)):
            n = prompt.shape[-2]
            enters, leaves = (not carried or layer == end for end in (0, len(blocks) - 1))

            def before(
                _: nn.Module,
                args: tuple[Tensor, ...],
                kwargs: dict[str, Any],
                prompt: Tensor = prompt,
                n: int = n,
                enters: bool = enters,
            ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
                x, *rest = args
                if rest:  # Gemma 4 passes its tables by position
                    rest = [F.pad(rest[0], (0, 0, n, 0), value=1.0), F.pad(rest[1], (0, 0, n, 0), value=0.0), *rest[2:]]
                tables = ("attn_mask", "shared_rel_pos", "shared_rel_pos_bias")
                kwargs = {
                    key: pad_table(value, n) if key in tables and value is not None else value
                    for key, value in kwargs.items()
                }
                return (torch.cat([prompt.expand(len(x), -1, -1), x], 1) if enters else x, *rest), kwargs

            def after(_: nn.Module, args: Any, out: Tensor, n: int = n, leaves: bool = leaves) -> Tensor:
                return out[:, n:] if leaves else out

            for handle in (
                block.register_forward_pre_hook(before, with_kwargs=True),
                block.register_forward_hook(after),
            ):
                stack.callback(handle.remove)
            for part in list(block.modules()):
                if hasattr(part, "num_prefix_tokens"):
                    stack.enter_context(mock.patch.object(part, "num_prefix_tokens", part.num_prefix_tokens + n))
                if hasattr(part, "_get_rel_pos_bias") and part.relative_position_bias_table is not None:
                    stack.enter_context(padded_table(part, "_get_rel_pos_bias", n))
                if getattr(part, "rel_pos", None) is not None:
                    stack.enter_context(padded_table(part.rel_pos, "get_bias", n))
        yield


def padded_table(part: Any, name: str, n: int) -> Any:
    made = getattr(part, name)

    def padded() -> Tensor:
        return pad_table(made(), n)

    return mock.patch.object(part, name, padded)
