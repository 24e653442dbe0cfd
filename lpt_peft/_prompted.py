"""The classes that stand in for blocks and attentions with prompts, and what they hand to each other.

Made once for each original class. No forward is restated: a prompted block runs its own forward on the prompt as far
as its attention, which notes the normed prompt; then on the tokens, where the attention appends what was noted.
The notes live in a `threading.local` for the duration of the call. Not here: which modules change class
(`lpt_peft.prompting`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from lpt_peft._positions import extend_arguments
from lpt_peft.errors import BackboneError

_BIAS_METHODS = ("_get_rel_pos_bias", "get_bias")  # give a bias (1, h, N, N) inside an attention

Recorder = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


class Prompted:
    """Mark of a class that takes prompts; `original` is the class it stands in for."""

    original: ClassVar[type[nn.Module]]
    key: ClassVar[tuple[Any, ...]]
    """What `prompted_class` makes it from."""
    arguments: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters of `forward`, tokens first."""
    sites: ClassVar[int] = 0
    """Of a block: the attention modules that it calls; 0 where attention is written into the block."""
    outputs: ClassVar[int | None] = None
    """Of an attention: length of the tuple that it returns, 0 for a tensor, None until it has run."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class cannot be found by name, in this process or the next: it is made again from the original.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_rebuild, (*type(self).key, type(self).outputs), *reduced[2:])


class _Notes:
    """The prompt of one call of a block: `normed` (1 or B, n, d) for each of its attentions."""

    def __init__(self, block: nn.Module, sites: int) -> None:
        self.block = block
        self.sites = sites
        self.normed: list[tuple[nn.Module, Tensor]] = []
        self.capturing = True
        self.length = 0


class _Local(threading.local):
    """What this thread's prompted block hands to its attentions, and who records its calls."""

    notes: _Notes | None = None
    recording: tuple[Sequence[nn.Module], Recorder] | None = None


class _CapturedError(Exception):
    """Leaves a block's forward as soon as the normed prompt is known."""


_local = _Local()
_made: dict[tuple[Any, ...], type[Any]] = {}


@contextmanager
def recording(modules: Sequence[nn.Module], recorder: Recorder) -> Iterator[None]:
    """While open, on this thread, blocks among `modules` answer `recorder(tokens, args, kwargs)` instead of running.

    Classifiers among them that were given to `pass_through` answer with their input.
    """
    outer, _local.recording = _local.recording, (modules, recorder)
    try:
        yield
    finally:
        _local.recording = outer


def prompted_class(original: type[nn.Module], kind: str, sites: int, outputs: int | None = None) -> type[Any]:
    """The subclass that takes prompts, made once, of a "block", its "attention", a "bias" in there, or a "head"."""
    key = (original, kind, sites)
    if (made := _made.get(key)) is None:
        multihead = issubclass(original, nn.MultiheadAttention)
        forwards = {"block": _block_forward, "attention": _multihead_forward if multihead else _attention_forward}
        forwards["head"] = _head_forward
        members: dict[str, Any] = {"original": original, "key": key, "sites": sites}
        members["arguments"] = tuple(inspect.signature(original.forward).parameters)[1:]
        members["outputs"] = 2 if multihead else None
        members |= {name: _padded_bias(name) for name in _BIAS_METHODS if hasattr(original, name)}
        if kind in forwards:
            members["forward"] = forwards[kind]
        made = _made.setdefault(key, type(f"Prompted{original.__name__}", (Prompted, original), members))
    if made.outputs is None and outputs is not None:
        made.outputs = outputs
    return made


def _rebuild(original: type[nn.Module], kind: str, sites: int, outputs: int | None) -> nn.Module:
    prompted: Any = prompted_class(original, kind, sites, outputs)
    module: nn.Module = prompted.__new__(prompted)
    return module


def _block_forward(self: Any, *given: Any, prompt: Tensor | None = None, **kwargs: Any) -> Any:
    """The block's own forward; with `prompt` (1 or B, n, d), tokens (B, N, d) also attend to it."""
    original: Any = type(self).original
    tokens, args = (given[0], given[1:]) if given else (kwargs.pop(self.arguments[0]), ())
    if prompt is None and (recorder := _recorder_of(self)) is not None:
        return recorder(tokens, args, kwargs)
    outer = _local.notes
    # While compiling, `checkpoint_in_graph` calls a block whose notes are taken already.
    noted = outer is not None and outer.block is self and torch.compiler.is_compiling()
    if prompt is None and (outer is None or noted):
        return original.forward(self, tokens, *args, **kwargs)
    if prompt is not None and not self.sites:  # attention is written into the block: prompts run through all of it
        count = tokens.shape[1]
        context = extend_arguments(self.arguments[1:], args, kwargs, tokens, prompt.shape[1])
        return original.forward(self, _append(tokens, prompt), **context)[:, :count]
    _local.notes = None
    try:
        if prompt is not None:
            _take_notes(self, prompt, args, kwargs)
        return original.forward(self, tokens, *args, **kwargs)
    finally:
        _local.notes = outer


def _take_notes(block: Any, prompt: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a block on the prompt (1 or B, n, d) as far as its attentions, and leave to them what they have seen."""
    notes = _local.notes = _Notes(block, block.sites)
    with suppress(_CapturedError):
        type(block).original.forward(block, prompt, *args, **kwargs)
    notes.capturing = False
    if len(notes.normed) < notes.sites:
        name = type(block).original.__name__
        raise BackboneError(
            f"Prompts do not work in {name}: it did not call the attention that takes them, which was replaced after "
            "wrap(), or is computed elsewhere. Replace modules before wrap(), or unwrap() and wrap the model again."
        )


def checkpoint_in_graph(block: Any, tokens: Tensor, prompt: Tensor, context: dict[str, Any]) -> Tensor:
    """A checkpointed block for a compiler, which recomputes in its graph and lets nothing be noted in there."""
    if not block.sites:
        inline: Tensor = checkpoint(block, tokens, prompt=prompt, use_reentrant=False, **context)
        return inline
    outer = _local.notes
    _take_notes(block, prompt, (), context)
    out: Tensor = checkpoint(block, tokens, use_reentrant=False, **context)  # with its hooks
    _local.notes = outer
    return out


def _attention_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The attention's own forward; inside a prompted block, on tokens and prompt, whose rows are dropped."""
    original: Any = type(self).original
    if (notes := _local.notes) is None:
        return original.forward(self, *args, **kwargs)
    first = self.arguments[0]
    tokens = args[0] if args else kwargs.pop(first)
    if notes.capturing:
        return _capture(self, notes, tokens)
    joined = _join(self, notes, tokens, 1)
    count = tokens.shape[1]
    context = extend_arguments(self.arguments[1:], args[1:], kwargs, tokens, notes.length)
    out = original.forward(self, joined, **context)
    if self.outputs is None:
        type(self).outputs = len(out) if isinstance(out, tuple) else 0
    return (out[0][:, :count], *out[1:]) if isinstance(out, tuple) else out[:, :count]


def _multihead_forward(
    self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """nn.MultiheadAttention's own forward; inside a prompted block, with the prompt among keys and values."""
    original: Any = type(self).original
    if (notes := _local.notes) is None:
        out: tuple[Tensor, Tensor | None] = original.forward(self, query, key, value, *args, **kwargs)
        return out
    if notes.capturing:
        captured: tuple[Tensor, Tensor | None] = _capture(self, notes, query)
        return captured
    if key.shape != query.shape or value.shape != query.shape:
        raise BackboneError(
            f"Prompts do not work where {type(self).original.__name__} attends to other tokens than its own: keys "
            f"{tuple(key.shape)} and values {tuple(value.shape)} for queries {tuple(query.shape)}."
        )
    axis = 1 if self.batch_first else 0
    joined = _join(self, notes, query, axis)
    kwargs |= dict(zip(self.arguments[3:], args, strict=False))
    for name in ("key_padding_mask", "attn_mask"):  # here True means masked, and 0 is added
        if kwargs.get(name) is not None:
            kwargs[name] = F.pad(kwargs[name], (0, joined.shape[axis] - query.shape[axis]))
    kwargs["is_causal"] = False  # a hint that `attn_mask` is causal, which the padded one is not
    # One tensor as key and value: both projections are then one product.
    attended: tuple[Tensor, Tensor | None] = original.forward(self, query, joined, joined, **kwargs)
    return attended


def _head_forward(self: Any, features: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The classifier's own forward, or its input while this thread is recording it."""
    original: Any = type(self).original
    return original.forward(self, features, *args, **kwargs) if _recorder_of(self) is None else features


def _recorder_of(module: nn.Module) -> Recorder | None:
    """Who records the calls of this very module, not of another one that a hook may run meanwhile."""
    if (active := _local.recording) is None:
        return None
    modules, recorder = active
    return recorder if any(recorded is module for recorded in modules) else None


def _capture(attention: Any, notes: _Notes, prompt: Tensor) -> Any:
    """Note the normed prompt, and leave the block once all its attentions have seen theirs."""
    notes.normed.append((attention, prompt))
    notes.length = prompt.shape[1]
    if len(notes.normed) == notes.sites and not _must_finish(attention):
        raise _CapturedError
    outputs = type(attention).outputs
    return (prompt, *[None] * (outputs - 1)) if outputs else prompt


def _must_finish(attention: nn.Module) -> bool:
    """Whether a block must run to its end on the prompt alone: it costs more, and nobody reads the result.

    Compilers and tracers lose their way over exceptions, and forward hooks count on every call to come back.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return bool(attention._forward_hooks) or _has_any_global_hook()


def _join(attention: nn.Module, notes: _Notes, tokens: Tensor, axis: int) -> Tensor:
    """Tokens and, along `axis`, the prompt that was noted, in the dtype that autocast is about to use."""
    normed = next(prompt for owner, prompt in notes.normed if owner is attention)
    kind = tokens.device.type
    if tokens.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        tokens = tokens.to(torch.get_autocast_dtype(kind))
    return _append(tokens, normed, axis)


def _append(tokens: Tensor, prompt: Tensor, axis: int = 1) -> Tensor:
    """(B, N, d) and (1 or B, n, d) to (B, N + n, d); both transposed for `axis` 0."""
    # shape[...] and not len(): torch.export takes the latter for a constant.
    shape = (tokens.shape[0], -1, -1) if axis else (-1, tokens.shape[1], -1)
    return torch.cat([tokens, prompt.to(tokens.dtype).expand(shape)], axis)


def _padded_bias(name: str) -> Callable[[Any], Tensor]:
    """The method `name`, whose bias (1, h, N, N) is 0 for prompts while one is among the tokens."""

    def get(self: Any) -> Tensor:
        bias: Tensor = getattr(type(self).original, name)(self)
        length = 0 if (notes := _local.notes) is None else notes.length
        return F.pad(bias, (0, length, 0, length)) if length else bias

    return get
