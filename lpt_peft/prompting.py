"""Prompts in the blocks of a ViT: attach, detach and run.

A prompt enters a block as extra tokens of its attention modules: the attention runs on `[norm(x); norm(P)]`, and the
prompt rows of its output are dropped. The result equals token concatenation (append `P` to the block's input, drop its
outputs), but `P` does not pass the MLP and the residual branches.

Blocks and attentions take prompts because their `__class__` is replaced by a subclass. No forward is copied and modules
hold no extra state, so state-dict keys, deepcopy, pickle and threads work as before.

Not here: those subclasses (`_prompted.py`), the self-check (`_self_check.py`), and the names of any ViT library
(`lpt_peft.backbones`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpt_peft._call_state import Recorder, call_state, recording
from lpt_peft._prompted import Prompted, checkpoint_in_graph, prompted_class
from lpt_peft._self_check import check_block, gradient_gap
from lpt_peft.errors import BackboneError

__all__ = [
    "Prompt",
    "Prompted",
    "Recorder",
    "attach_blocks",
    "attentions_of",
    "batched",
    "detach_blocks",
    "find_gradient_gap",
    "pass_through",
    "prompt_arguments",
    "recording",
    "run_block",
    "set_prompt_mask",
]

Prompt = Tensor | int | None
"""Prompt of a block: see `run_block`."""
_ATTENTION_NAMES = ("attn", "attention", "self_attn", "self_attention")  # attributes of a block
_LAYER_NUMBER = re.compile(r"idx|index|layer_(id|num)")  # attributes that differ between layers of one kind


def attach_blocks(blocks: Sequence[nn.Module], dim: int, *, hint: str) -> None:
    """Let all blocks take prompts and check one block of each kind; an error leaves the blocks unchanged.

    Args:
        blocks: The transformer blocks, in order.
        dim: Width of the tokens.
        hint: What to build or use instead, for the message.

    Raises:
        BackboneError: The blocks already take prompts, a forward was replaced, or prompts do not work in a block.
    """
    kinds: dict[nn.Module, tuple[Any, ...]] = {}
    for block in blocks:  # the same block may appear twice
        _check_attachable(block)
        attentions = attentions_of(block)
        kinds[block] = ("block", len(attentions))
        for attention in attentions:
            kinds |= {part: ("bias", 0) for part in attention.modules() if hasattr(part, "get_bias")}
            kinds[attention] = ("uncast attention" if _uses_autocast(attention) else "attention", 0)
    for module in kinds:
        _check_attachable(module)
    try:
        for module, kind in kinds.items():
            module.__class__ = prompted_class(type(module), *kind)
        for block in {_settings_of_parts(block): block for block in blocks}.values():
            check_block(block, type(block).original, dim, hint=hint)  # type: ignore[attr-defined]
    except BaseException:  # Ctrl-C as well
        detach_blocks(blocks)
        raise


def detach_blocks(blocks: Sequence[nn.Module]) -> None:
    """Restore the original classes of all blocks and their parts."""
    for block in blocks:
        for module in block.modules():
            if isinstance(module, Prompted):
                module.__class__ = type(module).original  # type: ignore[assignment]


def attentions_of(block: nn.Module) -> list[nn.Module]:
    """Return the attention modules of a block, in order; empty if it computes attention in its own forward.

    PEFT's wrapper around an `nn.MultiheadAttention` is skipped.
    """
    found = []
    for holder in getattr(block, "attns", [block]):
        named = (getattr(holder, name, None) for name in _ATTENTION_NAMES)
        if (attention := next((module for module in named if isinstance(module, nn.Module)), None)) is not None:
            inner = getattr(attention, "base_layer", None)
            found.append(inner if isinstance(inner, nn.MultiheadAttention) else attention)
    return found


def run_block(block: nn.Module, tokens: Tensor, prompt: Prompt, *, checkpointing: bool, **context: Any) -> Tensor:
    """Run a block.

    Args:
        block: A block; with a prompt, a block that takes prompts.
        tokens: (B, N, d), floating point.
        prompt: (n, d), the same for all images, or (B, n, d); cast to the tokens' dtype. None: no prompt. An integer
            n: the last n tokens are a prompt, which earlier blocks have returned; no argument of the block covers them.
        checkpointing: Recompute the block in the backward pass. The prompt is an argument of the recomputed call, so
            that two forwards before one backward keep separate prompts.
        **context: Further arguments of the block (mask, rotary embedding).

    Returns:
        Tokens (B, N, d).
    """
    given = prompt_arguments(prompt, tokens.dtype)
    if "prompt" in given and checkpointing and torch.is_grad_enabled() and torch.compiler.is_compiling():
        return checkpoint_in_graph(block, tokens, given["prompt"], context)
    context |= given
    if checkpointing and torch.is_grad_enabled():
        out: Tensor = checkpoint(block, tokens, use_reentrant=False, **context)
        return out
    result: Tensor = block(tokens, **context)
    return result


def prompt_arguments(prompt: Prompt, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of a block that pass it a prompt, as in `run_block`, for tokens of a dtype."""
    if prompt is None:
        return {}
    return {"carried": prompt} if isinstance(prompt, int) else {"prompt": batched(prompt).to(dtype)}


def batched(prompt: Tensor) -> Tensor:
    """Return a prompt (n, d) or (B, n, d) as (1 or B, n, d)."""
    return prompt if prompt.ndim == 3 else prompt.unsqueeze(0)


def set_prompt_mask(mask: Tensor | None) -> None:
    """Exclude tokens of the prompts of the next calls on this thread, until the mask is set to None.

    Images with fewer prompt tokens than others of their batch are padded with excluded tokens. Attention modules that
    take no mask raise `BackboneError` when they run.

    Args:
        mask: (B, n) bool, True for the tokens that count; None for prompts without padding.
    """
    call_state.mask = mask


def find_gradient_gap(blocks: Sequence[nn.Module], dim: int) -> str | None:
    """Return the first class in prompted blocks that passes no gradient (integer arithmetic), or None."""
    return next((gap for block in blocks if (gap := gradient_gap(block, dim)) is not None), None)


def pass_through(head: nn.Module) -> None:
    """Let a classifier return its input while this thread is `recording` it."""
    if not isinstance(head, Prompted):
        _check_attachable(head)
        head.__class__ = prompted_class(type(head), "head", 0)


def _check_attachable(module: nn.Module) -> None:
    name = type(module).__name__
    if isinstance(module, Prompted):
        raise BackboneError(
            f"{type(module).original.__name__} already takes prompts: this model is wrapped by another adapter, or is "
            "a copy of a wrapped model. Call unwrap() on that adapter first, or copy the model before wrap()."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise BackboneError(f"This {name} is scripted, so its forward is fixed. Wrap the model without scripting it.")
    if "_checkpoint_wrapped_module" in module._modules:
        raise BackboneError(
            f"This {name} recomputes a block that does not take prompts yet. Wrap the model first, then apply "
            "activation checkpointing to the adapter, or use the model's own (set_grad_checkpointing)."
        )
    if "forward" in vars(module):
        raise BackboneError(
            f"The forward of this {name} was replaced on the object, as accelerate does to offload a model or to "
            "distribute it over devices, so prompts would not reach it. Load the model without device_map and without "
            "offloading, and wrap it; compile it, offload it (transformers' models) or move it with to() afterwards."
        )


def _uses_autocast(attention: nn.Module) -> bool:
    """Whether an attention may turn autocast off or change its dtype, so that its input must not be cast before."""
    return any(_mentions_autocast(type(part)) for part in attention.modules())  # type: ignore[arg-type]


@cache
def _mentions_autocast(original: type[nn.Module]) -> bool:
    """Whether a method of the class, or a function that it calls, uses a name with "autocast"."""
    for cls in original.__mro__:
        if cls.__module__.startswith("torch."):
            continue
        for method in filter(inspect.isfunction, vars(cls).values()):
            called = (method.__globals__.get(name) for name in method.__code__.co_names)
            for function in (method, *filter(inspect.isfunction, called)):
                code = function.__code__
                if any("autocast" in name for name in (code.co_name, *code.co_names, *code.co_freevars)):
                    return True
    return False


def _settings_of_parts(block: nn.Module) -> tuple[Any, ...]:
    """Classes of a block's parts and their settings; blocks with the same need one self-check."""
    return tuple((type(part), *_settings(part)) for part in block.modules())


def _settings(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes that may select another computation (a window size, a flag), without the layer number."""
    for name, value in vars(part).items():
        if type(value) in (bool, int, str) and name != "training" and not _LAYER_NUMBER.search(name):
            yield name, value
