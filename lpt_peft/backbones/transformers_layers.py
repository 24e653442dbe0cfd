"""transformers' encoder layers with prompt keys and values: one subclass for each layer class, made when met.

A prompted layer runs its own original forward twice under the attention function registered here: once on the
prompt, as far as the attention function, to take keys and values as they arrive there (behind norm, projections,
qk-norm, LoRA), and once on the tokens, where they are appended. No layer's inside is restated or known by name.
What layer and attention function share during a call lies on the config object they share, and only then. So a
wrapped model, and with it others built from the same config object, run one forward at a time: threads take turns, or
have a copy each.

Not here: the whole model (`transformers_vit.py`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lpt_peft.attention import Prompted, append, extend_mask
from lpt_peft.errors import BackboneError, StateError

IMPLEMENTATIONS = ("sdpa", "eager")  # the attention functions that prompts can go through
WORKS = "What works: plain ViTs, for example ViTModel, Dinov2Model, DINOv3ViTModel, CLIPVisionModel, SiglipVisionModel."
_NAME = "lpt_peft"  # of our attention function
_BUSY = (
    "This model is in the middle of another forward: calls from several threads must take turns (a lock), or have "
    "copy.deepcopy(model) each."
)
_STATE = "_lpt_peft_state"  # attribute of the config, while a call lasts


@dataclass
class Tape:
    """What a model's own forward gives its layers, while they only pass tokens on, or hand out other ones.

    Attributes:
        final: Tokens (B, N, d) that every layer answers with; None lets each note its input and pass it on.
        calls: One (tokens, further positional arguments, keyword arguments) for each layer, as noted.
    """

    final: Tensor | None = None
    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


@dataclass
class _Pair:
    """Keys and values of a prompt, (1 or B, h, n, e), once the attention function has seen them, for one layer."""

    layer: nn.Module
    implementation: str
    key: Tensor | None = None
    value: Tensor | None = None


class _SeenError(Exception):
    """Leaves a layer's forward as soon as the prompt's keys and values are known."""


def attention_config(layer: nn.Module) -> Any:
    """The config object (PreTrainedConfig) that the layer's attention asks for its function; None without one."""
    for module in layer.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
    return None


class taped:  # noqa: N801 - a context manager reads as a verb
    """While open, the layers that share `config` follow the tape instead of computing."""

    def __init__(self, config: PreTrainedConfig, tape: Tape) -> None:
        self.config, self.tape = config, tape

    def __enter__(self) -> Tape:
        if hasattr(self.config, _STATE):
            raise StateError(_BUSY)
        setattr(self.config, _STATE, self.tape)
        return self.tape

    def __exit__(self, *_: object) -> None:
        delattr(self.config, _STATE)


def prompted_class(original: type[nn.Module]) -> type[Any]:
    """The subclass of a layer class that takes `prompt` (1 or B, n, d) behind its own arguments."""
    if original not in _MADE:
        members = {"original": original, "forward": _forward}
        _MADE[original] = type(f"Prompted{original.__name__}", (_PromptedLayer, original), members)
    return _MADE[original]


_MADE: dict[type[nn.Module], type[Any]] = {}  # layer class -> its prompted subclass


class _PromptedLayer(Prompted):
    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class has no name to be found by, in this process or the next: it is made again from the original.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_rebuild, (type(self).original,), *reduced[2:])

    def without_positions(self, count: int) -> dict[str, Any]:
        """No mask, no relative bias, and the rotation by no angle: not defined for prompts by concatenation."""
        layer: Any = self
        for part in layer.modules():
            if isinstance(getattr(part, "relative_position_bias", None), nn.Module):
                part.relative_position_bias = None
        config, reference = attention_config(layer), next(layer.parameters())
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        no_rotation = (reference.new_ones(count, width), reference.new_zeros(count, width))
        known = {"attention_mask": None, "causal_attention_mask": None, "position_embeddings": no_rotation}
        names = list(inspect.signature(type(layer).original.forward).parameters)[2:]
        return {name: known[name] for name in names if name in known}


def _rebuild(original: type[nn.Module]) -> nn.Module:
    prompted: Any = prompted_class(original)
    layer: nn.Module = prompted.__new__(prompted)
    return layer


def _forward(self: Any, tokens: Tensor, *args: Any, prompt: Tensor | None = None, **kwargs: Any) -> Any:
    """The layer's own forward, or under a tape, or with a prompt."""
    original: Any = type(self).original
    config = attention_config(self)
    state = getattr(config, _STATE, None)
    if isinstance(state, Tape):
        if state.final is None:
            state.calls.append((tokens, args, kwargs))
            return tokens
        return state.final
    if state is not None:
        raise StateError(_BUSY)
    if prompt is None:
        return original.forward(self, tokens, *args, **kwargs)
    pair = _Pair(self, implementation_of(config))
    before = config._attn_implementation_internal
    setattr(config, _STATE, pair)
    config._attn_implementation_internal = _NAME
    try:
        length = prompt.shape[-2]
        neutral = {name: _without_position(value, length) for name, value in kwargs.items()}
        with suppress(_SeenError):
            original.forward(self, prompt, *(_without_position(value, length) for value in args), **neutral)
        if pair.key is None:
            raise BackboneError(
                f"Prompts do not reach the attention of {original.__name__} of {original.__module__}: it does not ask "
                f"transformers' attention interface for its function. {WORKS}"
            )
        return original.forward(self, tokens, *args, **kwargs)
    finally:
        config._attn_implementation_internal = before
        delattr(config, _STATE)


def implementation_of(config: PreTrainedConfig) -> str:
    """The attention function the model was built with, "sdpa" or "eager".

    Raises:
        BackboneError: The model uses another attention function.
    """
    name = config._attn_implementation or "eager"
    if name not in IMPLEMENTATIONS:
        raise BackboneError(
            f'attn_implementation="{name}" takes no prompts; "sdpa" and "eager" do. Call '
            'model.set_attn_implementation("sdpa"), or load the model with attn_implementation="sdpa".'
        )
    return name


def _without_position(value: Any, length: int) -> Any:
    """A layer's argument for `length` prompt tokens: rotary tables (cos, sin) become those of no rotation."""
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
        cos, sin = value
        shape = (*cos.shape[:-2], length, cos.shape[-1])
        return cos.new_ones(shape), sin.new_zeros(shape)
    return value


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """The registered attention function: heads (B, h, N, e), fewer of them for grouped keys and values."""
    pair: _Pair | None = getattr(module.config, _STATE, None)
    if pair is None or not (torch.compiler.is_compiling() or any(part is module for part in pair.layer.modules())):
        # Another model with the same config object, called meanwhile by another thread or a hook.
        name = implementation_of(module.config) if pair is None else pair.implementation
        return _function(module, name)(module, query, key, value, attention_mask, **kwargs)
    if pair.key is None or pair.value is None:
        pair.key, pair.value = key, value
        if torch.compiler.is_compiling():  # torch.export loses its way over exceptions, and drops what nobody reads
            return query.transpose(1, 2), None
        raise _SeenError
    mask = extend_mask(attention_mask, False, query.transpose(1, 2), pair.key.shape[-2])
    function = _function(module, pair.implementation)
    return function(module, query, append(key, pair.key), append(value, pair.value), mask, **kwargs)


def _function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The model's own attention function; each modelling file of transformers has its own eager one."""
    if implementation == "eager":
        eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return eager
    registered: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[implementation]
    return registered


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
