"""Subclasses of blocks and attentions that take prompts, created once per original class.

A prompted block first runs its original forward on the prompt alone, as far as its attention, which captures the
normalized prompt. It then runs on the tokens, and the attention appends what was captured. The captured prompt is kept
for the thread during the call (`_call_state.py`). Not here: which modules change class (`lpt_peft.prompting`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from lpt_peft._call_state import CapturedPrompt, call_state, recorder_of
from lpt_peft._positions import exclude_prompts, excluded_keys, extend_arguments
from lpt_peft.errors import BackboneError, StateError

_BIAS_METHODS = ("_get_rel_pos_bias", "get_bias")  # return a bias (1, h, N, N) inside an attention


class Prompted:
    """Base of all classes that take prompts."""

    original: ClassVar[type[nn.Module]]
    """The class of the module before `wrap`."""
    key: ClassVar[tuple[Any, ...]]
    """Arguments of `prompted_class`."""
    arguments: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters of `forward`, tokens first."""
    sites: ClassVar[int] = 0
    """Of a block: the number of attention modules it calls; 0 if it computes attention in its own forward."""
    outputs: ClassVar[int | None] = None
    """Of an attention: length of the tuple it returns, 0 for a tensor, None before its first call."""
    autocasts: ClassVar[bool] = True
    """Of an attention: it follows the caller's autocast, so that tokens may be cast before they are joined."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickle cannot find the class by name: it is created again from the original.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_rebuild, (*type(self).key, type(self).outputs), *reduced[2:])

    def __prepare_scriptable__(self) -> NoReturn:
        raise StateError(
            f"torch.jit.script does not support the prompts in {type(self).original.__name__}. Call unwrap() before "
            "scripting the model, or use torch.compile, torch.export or torch.jit.trace."
        )


class _CapturedError(Exception):
    """Leaves a block's forward as soon as the normalized prompt is known."""


_classes: dict[tuple[Any, ...], type[Any]] = {}


def prompted_class(original: type[nn.Module], kind: str, sites: int, outputs: int | None = None) -> type[Any]:
    """Return the subclass that takes prompts; `kind` is "block", "attention", "uncast attention", "bias" or "head"."""
    key = (original, kind, sites)
    if (prompted := _classes.get(key)) is None:
        multihead = issubclass(original, nn.MultiheadAttention)
        attention = _multihead_forward if multihead else _attention_forward
        forwards = {"block": _block_forward, "attention": attention, "uncast attention": attention}
        forwards["head"] = _head_forward
        members: dict[str, Any] = {"original": original, "key": key, "sites": sites}
        members["arguments"] = tuple(inspect.signature(original.forward).parameters)[1:]
        members["outputs"] = 2 if multihead else None
        members["autocasts"] = kind != "uncast attention"
        members |= {name: _padded_bias(name) for name in _BIAS_METHODS if hasattr(original, name)}
        if kind in forwards:
            members["forward"] = forwards[kind]
        prompted = _classes.setdefault(key, type(f"Prompted{original.__name__}", (Prompted, original), members))
    if prompted.outputs is None and outputs is not None:
        prompted.outputs = outputs
    return prompted


def _rebuild(original: type[nn.Module], kind: str, sites: int, outputs: int | None) -> nn.Module:
    prompted: Any = prompted_class(original, kind, sites, outputs)
    module: nn.Module = prompted.__new__(prompted)
    return module


def _block_forward(self: Any, *given: Any, prompt: Tensor | None = None, carried: int = 0, **kwargs: Any) -> Any:
    """Run the block's original forward; with `prompt` (1 or B, n, d), tokens (B, N, d) also attend to it.

    With `carried`, the last tokens are a prompt already, and pass through the whole block.
    """
    original: Any = type(self).original
    tokens, args = (given[0], given[1:]) if given else (kwargs.pop(self.arguments[0]), ())
    if carried:
        return _carry(self, carried, tokens, args, kwargs)
    if prompt is None and (recorder := recorder_of(self)) is not None:
        return recorder(tokens, args, kwargs)
    outer = call_state.prompt
    # While compiling, `checkpoint_in_graph` calls a block whose prompt is already captured.
    captured = outer is not None and outer.block is self and torch.compiler.is_compiling()
    if prompt is None and (outer is None or captured):
        return original.forward(self, tokens, *args, **kwargs)
    if prompt is not None and not self.sites:  # no attention module: prompts pass through the whole block
        count = tokens.shape[1]
        context = extend_arguments(self.arguments[1:], args, kwargs, tokens, prompt.shape[1])
        if call_state.mask is not None:
            context = exclude_prompts(self.arguments[1:], context, tokens, call_state.mask)
        return original.forward(self, _append(tokens, prompt), **context)[:, :count]
    call_state.prompt = None
    try:
        if prompt is not None:
            _capture_prompt(self, prompt, args, kwargs)
        return original.forward(self, tokens, *args, **kwargs)
    finally:
        call_state.prompt = outer


def _carry(block: Any, carried: int, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block on tokens that end with a prompt; its attentions extend masks, biases and rotary tables."""
    if not block.sites:
        args, kwargs = (), extend_arguments(block.arguments[1:], args, kwargs, tokens[:, :-carried], carried)
    call_state.carried = carried
    try:
        return type(block).original.forward(block, tokens, *args, **kwargs)
    finally:
        call_state.carried = 0


def _capture_prompt(block: Any, prompt: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a block on the prompt (1 or B, n, d) as far as its attentions, and keep their inputs for this thread."""
    captured = call_state.prompt = CapturedPrompt(block, block.sites)
    with suppress(_CapturedError):
        type(block).original.forward(block, prompt, *args, **kwargs)
    captured.capturing = False
    if len(captured.normed) < captured.sites:
        name = type(block).original.__name__
        raise BackboneError(
            f"Prompts do not work in {name}: it did not call the attention that takes them, which was replaced after "
            "wrap(), or is computed elsewhere. Replace modules before wrap(), or unwrap() and wrap the model again."
        )


def checkpoint_in_graph(block: Any, tokens: Tensor, prompt: Tensor, context: dict[str, Any]) -> Tensor:
    """Checkpoint a block while compiling: the compiler recomputes it in its graph, where nothing can be captured."""
    if not block.sites:
        inline: Tensor = checkpoint(block, tokens, prompt=prompt, use_reentrant=False, **context)
        return inline
    outer = call_state.prompt
    try:
        _capture_prompt(block, prompt, (), context)
        out: Tensor = checkpoint(block, tokens, use_reentrant=False, **context)  # with its hooks
        return out
    finally:
        call_state.prompt = outer


def _attention_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the attention's original forward; inside a prompted block, on tokens and prompt, whose rows are dropped."""
    original: Any = type(self).original
    captured, carried = call_state.prompt, call_state.carried
    if captured is None and not carried:
        return original.forward(self, *args, **kwargs)
    tokens = args[0] if args else kwargs.pop(self.arguments[0])
    if captured is None:
        context = extend_arguments(self.arguments[1:], args[1:], kwargs, tokens[:, :-carried], carried)
        return original.forward(self, tokens, **context)
    if captured.capturing:
        return _capture(self, captured, tokens)
    joined = _join(self, captured, tokens, 1)
    count = tokens.shape[1]
    context = extend_arguments(self.arguments[1:], args[1:], kwargs, tokens, captured.length)
    if captured.mask is not None:
        context = exclude_prompts(self.arguments[1:], context, tokens, captured.mask)
    out = original.forward(self, joined, **context)
    if self.outputs is None:
        type(self).outputs = len(out) if isinstance(out, tuple) else 0
    return (out[0][:, :count], *out[1:]) if isinstance(out, tuple) else out[:, :count]


def _multihead_forward(
    self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Run nn.MultiheadAttention's forward; inside a prompted block, with the prompt among keys and values."""
    original: Any = type(self).original
    captured, carried = call_state.prompt, call_state.carried
    if captured is None and not carried:
        out: tuple[Tensor, Tensor | None] = original.forward(self, query, key, value, *args, **kwargs)
        return out
    if captured is not None and captured.capturing:
        seen: tuple[Tensor, Tensor | None] = _capture(self, captured, query)
        return seen
    if key.shape != query.shape or value.shape != query.shape:
        raise BackboneError(
            f"Prompts need self-attention, and {type(self).original.__name__} attends to other tokens: keys "
            f"{tuple(key.shape)} and values {tuple(value.shape)} for queries {tuple(query.shape)}."
        )
    axis = 1 if self.batch_first else 0
    joined = key if captured is None else _join(self, captured, query, axis)
    extra = joined.shape[axis] - query.shape[axis] + carried
    kwargs |= dict(zip(self.arguments[3:], args, strict=False))
    for name, rows in (("key_padding_mask", 0), ("attn_mask", carried)):  # here True means masked, and 0 is added
        if (mask := kwargs.get(name)) is not None:
            kwargs[name] = F.pad(mask, (0, extra, 0, rows))
    if captured is not None and captured.mask is not None:
        if kwargs.get("key_padding_mask") is not None:
            raise BackboneError(
                f"{original.__name__} has a padding mask, which cannot be combined with a mask of the prompts: use "
                "images that need no mask."
            )
        batch_first = query if self.batch_first else query.transpose(0, 1)
        kwargs["key_padding_mask"] = excluded_keys(batch_first, captured.mask)
    kwargs["is_causal"] = False  # a hint that `attn_mask` is causal; the padded mask is not
    # The same tensor as key and value: both projections are then one product.
    attended: tuple[Tensor, Tensor | None] = original.forward(self, query, joined, joined, **kwargs)
    return attended


def _head_forward(self: Any, features: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run the classifier's original forward, or return its input while this thread records it."""
    original: Any = type(self).original
    return original.forward(self, features, *args, **kwargs) if recorder_of(self) is None else features


def _capture(attention: Any, captured: CapturedPrompt, prompt: Tensor) -> Any:
    """Keep the normalized prompt, and leave the block when all its attentions have been called."""
    captured.normed.append((attention, prompt))
    captured.length = prompt.shape[1]
    if len(captured.normed) == captured.sites and not _must_finish(attention):
        raise _CapturedError
    outputs = type(attention).outputs
    return (prompt, *[None] * (outputs - 1)) if outputs else prompt


def _must_finish(attention: nn.Module) -> bool:
    """Whether a block must run to its end on the prompt alone, which costs more time.

    Compilers and tracers do not support the exception, and forward hooks must run after every call.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return bool(attention._forward_hooks) or _has_any_global_hook()


def _join(attention: Any, captured: CapturedPrompt, tokens: Tensor, axis: int) -> Tensor:
    """Append the captured prompt along `axis`, in the dtype that autocast will use."""
    normed = next(prompt for owner, prompt in captured.normed if owner is attention)
    kind = tokens.device.type
    if tokens.dtype == torch.float32 and torch.is_autocast_enabled(kind) and attention.autocasts:
        tokens = tokens.to(torch.get_autocast_dtype(kind))
    return _append(tokens, normed, axis)


def _append(tokens: Tensor, prompt: Tensor, axis: int = 1) -> Tensor:
    """(B, N, d) and (1 or B, n, d) to (B, N + n, d); both transposed for `axis` 0."""
    # shape[...] and not len(), which torch.export would take for a constant.
    shape = (tokens.shape[0], -1, -1) if axis else (-1, tokens.shape[1], -1)
    return torch.cat([tokens, prompt.to(tokens.dtype).expand(shape)], axis)


def _padded_bias(name: str) -> Callable[[Any], Tensor]:
    """Return the method `name` with its bias (1, h, N, N) padded by 0 for the prompt."""

    def get(self: Any) -> Tensor:
        bias: Tensor = getattr(type(self).original, name)(self)
        length = call_state.carried if (captured := call_state.prompt) is None else captured.length
        return F.pad(bias, (0, length, 0, length)) if length else bias

    return get
