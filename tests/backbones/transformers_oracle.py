"""Oracle for transformers' encoder layers: token concatenation by hooks, written from the equations.

Like tests/oracle.py, with the other arguments of these layers: masks do not hide prompts, rotary tables do not rotate
them, their relative bias is 0. It does not use lpt_peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The first list of `...Layer` modules."""
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part))
    return next(part for part in lists if type(part[0]).__name__.endswith("Layer"))


@contextmanager
def concatenated_prompts(
    layers: Sequence[nn.Module], prompts: Sequence[Tensor], *, carried: bool = False
) -> Iterator[None]:
    """Let layer i run on `[x; prompts[i]]`, (n, d) or (B, n, d), and return the first N tokens; a context.

    With `carried`, prompts[0] enters the first layer alone and passes through all of them.
    """
    with ExitStack() as stack:
        for index, (layer, prompt) in enumerate(zip(layers, prompts, strict=True)):
            count = prompt.shape[-2]
            enters, leaves = (not carried or index == end for end in (0, len(layers) - 1))

            def before(
                _: Any, args: Any, kwargs: Any, prompt: Tensor = prompt, count: int = count, enters: bool = enters
            ) -> Any:
                x, *rest = args
                joined = torch.cat([x, prompt.expand(len(x), -1, -1)], 1) if enters else x
                return (joined, *(extend(value, count) for value in rest)), {
                    name: extend(value, count) for name, value in kwargs.items()
                }

            def after(_: Any, args: Any, out: Tensor, count: int = count, leaves: bool = leaves) -> Tensor:
                return out[:, :-count] if leaves else out

            def pad_bias(_: Any, args: Any, bias: Tensor, count: int = count) -> Tensor:
                return F.pad(bias, (0, count, 0, count))

            handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
            handles += [
                part.register_forward_hook(pad_bias)
                for part in layer.modules()
                if type(part).__name__.endswith("RelativePositionBias")
            ]
            for handle in handles:
                stack.callback(handle.remove)
        yield


def extend(value: Any, count: int) -> Any:
    """A layer's argument for `count` more tokens after the others."""
    if isinstance(value, Tensor) and value.ndim == 4:  # a mask or shared relative bias (B or 1, 1 or h, N, N)
        allowed = True if value.dtype == torch.bool else 0.0
        return F.pad(value, (0, count, 0, count), value=allowed)
    if isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], Tensor):  # rotary cos, sin
        cos, sin = value
        return (
            torch.cat([cos, torch.ones_like(cos[..., :count, :])], -2),
            torch.cat([sin, torch.zeros_like(sin[..., :count, :])], -2),
        )
    return value
