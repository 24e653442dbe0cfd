"""Prompt keys and values inside a block: attach, detach, and the proof that it works.

A prompted block reads its prompt as keys and values only,
`k = [W_k h; W_k p]`, `v = [W_v h; W_v p]`, which gives the numbers of appending prompt tokens to the
block's input and dropping their outputs, for less work. A module takes prompts by a swap of its
`__class__` for a subclass whose `forward` has one more argument, `prompt`; it carries no state, so
state-dict keys, deepcopy and pickle are as before, and without a prompt it runs the original forward.

Not here: the names of any ViT library (`lpt_peft.backbones`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpt_peft.errors import BackboneError

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}  # of the prompt's effect (TF32 allowed); 16 bits: 0.25


class Prompted:
    """Mark of a class that takes `prompt`; its `original` is the class it stands in for."""

    original: ClassVar[type[nn.Module]]


def attach(module: nn.Module, prompted: type[Any]) -> None:
    """Let `module` take prompts: swap its class for `prompted`.

    Raises:
        BackboneError: The module already takes prompts, or is not exactly of the class `prompted` stands in for.
    """
    if isinstance(module, Prompted):
        raise BackboneError(
            f"{type(module).original.__name__} already takes prompts: this model is wrapped by another adapter. "
            "Call unwrap() on that one first."
        )
    if type(module) is not prompted.original:
        raise BackboneError(f"{type(module).__name__} is not {prompted.original.__name__}.")
    module.__class__ = prompted


def detach(module: Any) -> None:
    """Give `module` its original class back; nothing happens where it has it."""
    if isinstance(module, Prompted):
        module.__class__ = type(module).original  # type: ignore[assignment]


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
    prompt = prompt.to(tokens.dtype)
    if prompt.ndim == 2:
        prompt = prompt.unsqueeze(0)
    if checkpointing and torch.is_grad_enabled():
        out: Tensor = checkpoint(block, tokens, prompt=prompt, use_reentrant=False, **context)
        return out
    result: Tensor = block(tokens, prompt=prompt, **context)
    return result


def append(sequence: Tensor, prompt: Tensor) -> Tensor:
    """Heads of keys or values (B, h, N, e) with those of the prompt (1 or B, h, n, e) behind: (B, h, N + n, e)."""
    return torch.cat([sequence, prompt.expand(len(sequence), -1, -1, -1)], dim=-2)


def extend_mask(mask: Tensor | None, is_causal: bool, tokens: Tensor, length: int) -> Tensor | None:
    """The attention mask with `length` columns more, all allowed; causality becomes an explicit mask.

    Args:
        mask: Boolean (True = may attend) or additive mask, broadcastable to (B, h, N, N), or None.
        is_causal: Token i sees tokens 0..i, and every prompt; takes precedence over `mask`, as upstream.
        tokens: (B, N, d): gives N and the device.
        length: Prompt tokens `n`.
    """
    count = tokens.shape[1]
    if is_causal:
        mask = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
    if mask is None:
        return None
    if mask.shape[-1] != count:
        mask = mask.expand(*mask.shape[:-1], count)
    return F.pad(mask, (0, length), value=True if mask.dtype == torch.bool else 0.0)


@torch.no_grad()
def check(block: nn.Module, dim: int, **context: Any) -> None:
    """Prove on random tokens that a prompted block does what appending prompt tokens would do.

    Compares with the original class on `[x; P]`, outputs of `P` dropped, and makes sure that the prompt
    has an effect at all. Catches upstream drift and silent no-ops. Runs in eval mode and leaves the
    module's mode and all random state as they were. Modules on the meta device are not checked.

    Raises:
        BackboneError: It does not; the message names the class.
    """
    parameter = next(block.parameters())
    if parameter.is_meta or not isinstance(block, Prompted):
        return
    device, dtype = parameter.device, parameter.dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, dim, generator=generator, dtype=torch.float64).to(device, dtype)
    prompt = torch.randn(3, dim, generator=generator, dtype=torch.float64).to(device, dtype).expand(2, 3, dim)
    modes = {module: module.training for module in block.modules()}
    original: Any = type(block).original
    try:
        block.eval()
        with torch.autocast(device.type, enabled=False):
            ours = block.forward(x, prompt=prompt, **context).double()
            wanted = original.forward(block, torch.cat([x, prompt], 1), **context)[:, :5].double()
            plain = original.forward(block, x, **context).double()
    except (TypeError, AttributeError, RuntimeError) as error:
        raise BackboneError(
            f"{original.__name__} of {original.__module__} is not the version this library knows: {error}. "
            "Install a supported version (see pyproject.toml) or report it."
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    effect = (wanted - plain).norm()
    if effect == 0 or not (ours - wanted).norm() <= _TOLERANCE.get(dtype, 0.25) * effect:
        raise BackboneError(
            f"Prompts do not work in {original.__name__} of {original.__module__}: with prompt keys and values it "
            f"is off by {float((ours - wanted).norm()):.2g} where the prompt's whole effect is {float(effect):.2g}. "
            "Its forward differs from the version this library knows; please report it."
        )
