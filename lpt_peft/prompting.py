"""How a block takes prompts: attach, detach and run.

A prompt enters a block as extra tokens of its attention modules alone: attention is a black box that is called on
`[norm(x); norm(P)]`, and the prompt rows of its output are dropped. The result is that of token concatenation (append
`P` to the block's input, drop its outputs) without sending `P` through the MLP and the residual branches.

Blocks and attentions take prompts by a swap of their `__class__` for a subclass. No forward is restated, and modules
carry no state: state-dict keys, deepcopy, pickle and threads are as before.

Not here: those subclasses (`_prompted.py`), the self-check (`_self_check.py`), and the names of any ViT library
(`lpt_peft.backbones`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpt_peft._prompted import Prompted, Recorder, checkpoint_in_graph, prompted_class, recording
from lpt_peft._self_check import check_block, gradient_gap
from lpt_peft.errors import BackboneError

__all__ = [
    "Prompted",
    "Recorder",
    "attach_blocks",
    "attentions_of",
    "batched",
    "detach_blocks",
    "find_gradient_gap",
    "pass_through",
    "recording",
    "run_block",
]

_ATTENTION_NAMES = ("attn", "attention", "self_attn", "self_attention")  # where a block keeps its attention
_LAYER_NUMBER = re.compile(r"idx|index|layer_(id|num)")  # attributes that differ between layers of one kind


def attach_blocks(blocks: Sequence[nn.Module], dim: int, *, hint: str) -> None:
    """Let every block take prompts and check one of each kind, or leave all as it was and raise.

    Args:
        blocks: The transformer blocks, in order.
        dim: Width of the tokens.
        hint: What to build or use instead, for the message.

    Raises:
        BackboneError: The blocks already take prompts, a forward was replaced, or prompts do not work in a block.
    """
    swaps: dict[nn.Module, tuple[Any, ...]] = {}
    for block in blocks:  # a block may stand twice
        attentions = attentions_of(block)
        swaps[block] = ("block", len(attentions))
        for attention in attentions:
            swaps |= {part: ("bias", 0) for part in attention.modules() if hasattr(part, "get_bias")}
            swaps[attention] = ("attention", 0)
    for module in swaps:
        _check_attachable(module)
    try:
        for module, kind in swaps.items():
            module.__class__ = prompted_class(type(module), *kind)
        for block in {_kind(block): block for block in blocks}.values():
            check_block(block, type(block).original, dim, hint=hint)  # type: ignore[attr-defined]
    except BaseException:  # Ctrl-C as well
        detach_blocks(blocks)
        raise


def detach_blocks(blocks: Sequence[nn.Module]) -> None:
    """Give every block and its parts their original classes back; nothing happens where they have them."""
    for block in blocks:
        for module in block.modules():
            if isinstance(module, Prompted):
                module.__class__ = type(module).original  # type: ignore[assignment]


def attentions_of(block: nn.Module) -> list[nn.Module]:
    """The attention modules that a block calls, in order; none where attention is written into the block.

    PEFT's wrapper around an `nn.MultiheadAttention` is looked through.
    """
    found = []
    for holder in getattr(block, "attns", [block]):
        named = (getattr(holder, name, None) for name in _ATTENTION_NAMES)
        if (attention := next((module for module in named if isinstance(module, nn.Module)), None)) is not None:
            inner = getattr(attention, "base_layer", None)
            found.append(inner if isinstance(inner, nn.MultiheadAttention) else attention)
    return found


def run_block(block: nn.Module, tokens: Tensor, prompt: Tensor, *, checkpointing: bool, **context: Any) -> Tensor:
    """One prompted block.

    Args:
        block: A block with its prompted class.
        tokens: (B, N, d), floating point.
        prompt: (n, d), the same for all images, or (B, n, d); cast to the tokens' dtype.
        checkpointing: Recompute the block in the backward pass. The prompt is an argument of the
            recomputed call: two forwards before one backward keep their own prompts.
        **context: What else the block takes (mask, rotary embedding).

    Returns:
        Tokens (B, N, d).
    """
    prompt = batched(prompt).to(tokens.dtype)
    if checkpointing and torch.is_grad_enabled():
        if torch.compiler.is_compiling():
            return checkpoint_in_graph(block, tokens, prompt, context)
        out: Tensor = checkpoint(block, tokens, prompt=prompt, use_reentrant=False, **context)
        return out
    result: Tensor = block(tokens, prompt=prompt, **context)
    return result


def batched(prompt: Tensor) -> Tensor:
    """A prompt (n, d) or (B, n, d) as (1 or B, n, d)."""
    return prompt if prompt.ndim == 3 else prompt.unsqueeze(0)


def find_gradient_gap(blocks: Sequence[nn.Module], dim: int) -> str | None:
    """The class in prompted blocks through which no gradient passes (integer arithmetic); None where all do."""
    return next((gap for block in blocks if (gap := gradient_gap(block, dim)) is not None), None)


def pass_through(head: nn.Module) -> None:
    """Let a classifier answer with its input while this thread is `recording` it, and as ever otherwise."""
    if not isinstance(head, Prompted):
        _check_attachable(head)
        head.__class__ = prompted_class(type(head), "head", 0)


def _check_attachable(module: nn.Module) -> None:
    name = type(module).__name__
    if isinstance(module, Prompted):
        raise BackboneError(
            f"{type(module).original.__name__} already takes prompts: this model is wrapped by another adapter. "
            "Call unwrap() on that one first."
        )
    if "forward" in vars(module):
        raise BackboneError(
            f"This {name} has its forward replaced on the object, as accelerate does to offload a model or to spread "
            "it over devices, so prompts would not reach it. Load the model without device_map and without offloading, "
            "and wrap it; compile it, offload it (transformers' models) or move it with to() afterwards."
        )


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What blocks that need one self-check have in common: the classes of their parts and the settings of these."""
    return tuple((type(part), *_settings(part)) for part in block.modules())


def _settings(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes that may select another computation (a window size, a flag); not the number of the layer."""
    for name, value in vars(part).items():
        if type(value) in (bool, int, str) and name != "training" and not _LAYER_NUMBER.search(name):
            yield name, value
