"""How a block takes prompts: attach, detach and run.

A prompt enters a block as extra tokens of its attention modules alone: attention is a black box that is called on
`[norm(x); norm(P)]`, and the prompt rows of its output are dropped. The result is that of token concatenation (append
`P` to the block's input, drop its outputs) without sending `P` through the MLP and the residual branches.

Blocks and attentions take prompts by a swap of their `__class__` for a subclass made here. No forward is restated: the
block runs its own forward on `P` as far as its attention, which notes the normed prompt; then on `x`, where the
attention appends what was noted. The notes live in a `threading.local` for the duration of the call, so modules carry
no state: state-dict keys, deepcopy, pickle and threads are as before.

Not here: the self-check (`_self_check.py`) and the names of any ViT library (`lpt_peft.backbones`).
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from lpt_peft._self_check import check_block, gradient_gap
from lpt_peft.errors import BackboneError

_ATTENTION_NAMES = ("attn", "attention", "self_attn", "self_attention")  # where a block keeps its attention
_BIAS_METHODS = ("_get_rel_pos_bias", "get_bias")  # give a bias (1, h, N, N) inside an attention
_LAYER_NUMBER = re.compile(r"idx|index|layer_(id|num)")  # attributes that differ between layers of one kind
_COSINES, _SINES = ("rope_cos", "cos"), ("rope_sin", "sin")  # arguments that hold a rotary table (..., N, e)

Recorder = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


class Prompted:
    """Mark of a class that takes prompts; `original` is the class it stands in for."""

    original: ClassVar[type[nn.Module]]
    key: ClassVar[tuple[Any, ...]]
    """What `_prompted_class` makes it from."""
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
            module.__class__ = _prompted_class(type(module), *kind)
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
            return _checkpoint_in_graph(block, tokens, prompt, context)
        out: Tensor = checkpoint(block, tokens, prompt=prompt, use_reentrant=False, **context)
        return out
    result: Tensor = block(tokens, prompt=prompt, **context)
    return result


def batched(prompt: Tensor) -> Tensor:
    """A prompt (n, d) or (B, n, d) as (1 or B, n, d)."""
    return prompt if prompt.ndim == 3 else prompt.unsqueeze(0)


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


def find_gradient_gap(blocks: Sequence[nn.Module], dim: int) -> str | None:
    """The class in prompted blocks through which no gradient passes (integer arithmetic); None where all do."""
    return next((gap for block in blocks if (gap := gradient_gap(block, dim)) is not None), None)


def pass_through(head: nn.Module) -> None:
    """Let a classifier answer with its input while this thread is `recording` it, and as ever otherwise."""
    if not isinstance(head, Prompted):
        _check_attachable(head)
        head.__class__ = _prompted_class(type(head), "head", 0)


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
            "and wrap it; offload it afterwards (transformers' models), or move it with to()."
        )


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What blocks that need one self-check have in common: the classes of their parts and the settings of these."""
    return tuple((type(part), *_settings(part)) for part in block.modules())


def _settings(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes that may select another computation (a window size, a flag); not the number of the layer."""
    for name, value in vars(part).items():
        if type(value) in (bool, int, str) and name != "training" and not _LAYER_NUMBER.search(name):
            yield name, value


def _prompted_class(original: type[nn.Module], kind: str, sites: int, outputs: int | None = None) -> type[Any]:
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
    prompted: Any = _prompted_class(original, kind, sites, outputs)
    module: nn.Module = prompted.__new__(prompted)
    return module


def _block_forward(self: Any, *given: Any, prompt: Tensor | None = None, **kwargs: Any) -> Any:
    """The block's own forward; with `prompt` (1 or B, n, d), tokens (B, N, d) also attend to it."""
    original: Any = type(self).original
    tokens, args = (given[0], given[1:]) if given else (kwargs.pop(self.arguments[0]), ())
    if prompt is None and (recorder := _recorder_of(self)) is not None:
        return recorder(tokens, args, kwargs)
    outer = _local.notes
    if prompt is None and (outer is None or (outer.block is self and not outer.capturing)):
        return original.forward(self, tokens, *args, **kwargs)
    if prompt is not None and not self.sites:  # attention is written into the block: prompts run through all of it
        count = tokens.shape[1]
        context = _extended(self, args, kwargs, tokens, prompt.shape[1])
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


def _checkpoint_in_graph(block: Any, tokens: Tensor, prompt: Tensor, context: dict[str, Any]) -> Tensor:
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
    context = _extended(self, args[1:], kwargs, tokens, notes.length)
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


def _extended(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor, length: int
) -> dict[str, Any]:
    """The arguments behind the tokens (B, N, d), by name, for `length` tokens more that all may attend to."""
    if not args and not kwargs:
        return {}
    count = tokens.shape[1]
    named = {**dict(zip(module.arguments[1:], args, strict=False)), **kwargs}
    if named.pop("is_causal", False):  # takes precedence over a mask; every token sees every prompt
        named["attn_mask"] = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
    return {name: _extended_argument(name, value, count, length) for name, value in named.items()}


def _extended_argument(name: str, value: Any, count: int, length: int) -> Any:
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
        return _more_rows(value[0], length, 1.0), _more_rows(value[1], length, 0.0)  # cosines and sines
    if not isinstance(value, Tensor):
        return value
    if name in _COSINES or name in _SINES:
        return _more_rows(value, length, float(name in _COSINES))
    if name == "rope":  # timm: sines and cosines in one table
        sines, cosines = value.chunk(2, dim=-1)
        return torch.cat([_more_rows(sines, length, 0.0), _more_rows(cosines, length, 1.0)], -1)
    if value.shape[-1] != count:
        return value
    # A mask or bias: what is floating is added, all else says who may attend.
    rows = length if value.ndim > 1 and value.shape[-2] == count else 0
    return F.pad(
        value, (0, length, 0, rows) if value.ndim > 1 else (0, length), value=float(not value.is_floating_point())
    )


def _more_rows(table: Tensor, length: int, fill: float) -> Tensor:
    """A table (..., N, e) with `length` rows of `fill` behind."""
    return torch.cat([table, table.new_full((*table.shape[:-2], length, table.shape[-1]), fill)], -2)


def _padded_bias(name: str) -> Callable[[Any], Tensor]:
    """The method `name`, whose bias (1, h, N, N) is 0 for prompts while one is among the tokens."""

    def get(self: Any) -> Tensor:
        bias: Tensor = getattr(type(self).original, name)(self)
        length = 0 if (notes := _local.notes) is None else notes.length
        return F.pad(bias, (0, length, 0, length)) if length else bias

    return get
