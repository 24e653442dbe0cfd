"""Prompt keys and values inside a block: attach, detach, and the proof that it works.

A prompted block reads its prompt as keys and values only,
`k = [W_k h; W_k p]`, `v = [W_v h; W_v p]`, which gives the numbers of appending prompt tokens to the
block's input and dropping their outputs, for less work. A module takes prompts by a swap of its
`__class__` for a subclass whose `forward` has one more argument, `prompt`; it carries no state, so
state-dict keys, deepcopy and pickle are as before, and without a prompt it runs the original forward.

Not here: the names of any ViT library (`lpt_peft.backbones`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpt_peft.errors import BackboneError

_TOLERANCE = 1e-2  # of the prompt's whole effect: a wrong formula is off by about all of it
_ROUNDING = 1e-9  # of the tokens: less is no effect
_REPORT = "It may be of a version that this library does not know: see pyproject.toml, or report it."


class Prompted:
    """Mark of a class that takes `prompt`; its `original` is the class it stands in for."""

    original: ClassVar[type[nn.Module]]

    def without_positions(self, count: int) -> dict[str, Any]:
        """Make a throw-away copy blind to positions, and give the arguments for `count` such tokens.

        For the self-check, which moves prompts among tokens. Most blocks are blind without further arguments.
        """
        return {}


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


def attach_blocks(
    blocks: Sequence[nn.Module],
    sites: Callable[[nn.Module], Iterable[nn.Module]],
    prompted: Mapping[type, type[Any]],
    dim: int,
    *,
    cure: str,
) -> None:
    """Let every block take prompts and check one of each kind, or leave all as it was and raise.

    Args:
        blocks: The transformer blocks, in order.
        sites: The modules of a block that must change class: itself, and its attentions where they are modules.
        prompted: Class -> the class that takes prompts in its place.
        dim: Width of the tokens.
        cure: What to build or use instead, for the message.

    Raises:
        BackboneError: A class is not in `prompted`, the blocks already take prompts, or prompts do not work in one.
    """
    modules = list(dict.fromkeys(module for block in blocks for module in sites(block)))  # a block may stand twice
    for module in modules:
        if type(module) not in prompted and not isinstance(module, Prompted):
            known = ", ".join(sorted({cls.__name__ for cls in prompted}))
            raise BackboneError(
                f"{type(module).__name__} of {type(module).__module__} cannot take prompts; {known} can. {cure}"
            )
    attached: list[nn.Module] = []
    try:
        for module in modules:
            # An attached module is handed on as it is: attach() says whose it is.
            attach(module, prompted.get(type(module), type(module)))
            attached.append(module)
        for block in {tuple(type(part) for part in block.modules()): block for block in blocks}.values():
            check(block, dim, cure=cure)
    except BaseException:  # Ctrl-C as well
        for module in attached:
            detach(module)
        raise


def itself(block: nn.Module) -> tuple[nn.Module]:
    """The `sites` of a block whose attention is called, not changed."""
    return (block,)


def detach_blocks(blocks: Sequence[nn.Module], sites: Callable[[nn.Module], Iterable[nn.Module]]) -> None:
    """Give every block and attention its original class back."""
    for block in blocks:
        for module in sites(block):
            detach(module)


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
    # shape[0] and not len(): torch.export takes the latter for a constant.
    return torch.cat([sequence, prompt.expand(sequence.shape[0], -1, -1, -1)], dim=-2)


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
def check(block: nn.Module, dim: int, *, cure: str = "") -> None:
    """Prove on random tokens that a prompted block does what appending prompt tokens would do.

    Compares with the original class on `[x; P]`, outputs of `P` dropped, both blind to positions, and makes sure
    that the prompt has an effect at all. Catches upstream drift and silent no-ops. Runs on a copy in eval mode, in
    float64 and with random weights unless some are quantised: the formula is in question, not the weights, which
    may hide it (a fresh LayerScale of 1e-6 in bfloat16, a projection that starts at 0) or be on the meta device.

    Args:
        block: A block with its prompted class.
        dim: Width of its tokens.
        cure: What to build or use instead, for the message.

    Raises:
        BackboneError: Prompts do not work in this class; the message names it.
    """
    if not isinstance(block, Prompted):
        return
    original: Any = type(block).original
    name, way_out = f"{original.__name__} of {original.__module__}", f"{_REPORT} {cure}".rstrip()
    generator = torch.Generator("cpu").manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64, device="cpu")
    twin: Any = copy.deepcopy(block).eval()
    if any(parameter.is_meta for parameter in twin.parameters()):
        twin.to_empty(device="cpu")
        for buffer in twin.buffers():
            buffer.zero_()
    if all(parameter.is_floating_point() for parameter in twin.parameters()):
        twin.to("cpu", torch.float64)
        for parameter in twin.parameters():
            width = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.copy_(draw(parameter.shape) / width**0.5)
    reference = next(parameter for parameter in twin.parameters() if parameter.is_floating_point())
    x, prompt = (draw((2, count, dim)).to(reference) for count in (5, 3))
    try:
        few, all_of_them = twin.without_positions(5), twin.without_positions(8)
        with torch.autocast(reference.device.type, enabled=False):
            plain = original.forward(twin, x, **few)
            if not isinstance(plain, Tensor):
                raise BackboneError(
                    f"{name} answers with a {type(plain).__name__} where others do with tokens. {way_out}"
                )
            wanted = original.forward(twin, torch.cat([x, prompt], 1), **all_of_them)[:, :5].double()
            ours = twin.forward(x, prompt=prompt, **few).double()
    except BackboneError:
        raise
    except Exception as error:  # of whatever a block does
        raise BackboneError(
            f"{name} cannot be run on tokens alone, so whether prompts work in it is not known: {error}. {way_out}"
        ) from error
    effect, off = (float((one.double() - wanted).norm()) for one in (plain, ours))
    if effect <= _ROUNDING * float(wanted.norm()) or not off <= _TOLERANCE * effect:
        raise BackboneError(
            f"Prompts do not work in {name}: with prompt keys and values it is off by {off:.2g} where the prompt's "
            f"whole effect is {effect:.2g}. {way_out}"
        )
