"""The self-check of prompted blocks: random tokens through the block, against token concatenation.

It turns upstream drift into an error at `wrap`, where it would otherwise silently change answers. Not here: how a
block takes prompts (`lpt_peft.prompting`).
"""

from __future__ import annotations

import copy
import inspect
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lpt_peft.errors import BackboneError

_TOLERANCE = 1e-6  # of the prompt's whole effect, in float64 with random weights
_TOLERANCE_FLOAT32 = 1e-3  # the most, where a block computes in float32 whatever it is given
_TOLERANCE_QUANTIZED = 0.3  # the same where weights are quantized: activations are rounded, too, jointly for all tokens
_ROUNDING = 1e-9  # of the tokens: a smaller effect is none
_TOKENS = 67  # more than a window of 8 x 8 holds, and a prime, which no window divides
_REPORT = "It may be of a version that this library does not know: see pyproject.toml, or report it."
_BIASES = ("relative_position_bias_table", "rel_pos", "relative_position_bias")  # None switches them off


@torch.no_grad()
def check_block(block: nn.Module, original: Any, dim: int, *, hint: str = "") -> None:
    """Prove on random tokens that a prompted block does what appending prompt tokens would do.

    Compares with the original class on `[P; x]`, outputs of `P` dropped, both blind to positions, and makes sure
    that the prompt has an effect at all. Runs on a copy in eval mode, in float64 and with random weights, for the
    weights themselves may hide the prompt (a fresh LayerScale of 1e-6 in bfloat16, a projection that starts at 0) or
    be on the meta device. Blocks that refuse float64 run in float32; quantized ones as they are.

    Args:
        block: A block with its prompted class.
        original: The class that it had before.
        dim: Width of its tokens.
        hint: What to build or use instead, for the message.

    Raises:
        BackboneError: Prompts do not work in this class; the message names it.
    """
    name, way_out = _name(original), f"{_REPORT} {hint}".rstrip()
    try:
        twin = _copy(block).eval()
    except Exception as raised:  # of whatever a block holds
        raise BackboneError(
            f"{name} cannot be copied, and whether prompts work is checked on a copy: {raised}. Remove what cannot be "
            f"copied from it. {hint}".rstrip()
        ) from raised
    for part in twin.modules():
        if hasattr(part, "_hf_hook"):  # accelerate's offloading, which would bring the real weights in
            vars(part).pop("forward", None)
    if any(parameter.is_meta for parameter in twin.parameters()):
        twin.to_empty(device="cpu")
        for buffer in twin.buffers():
            buffer.zero_()
    _blind_to_positions(twin)
    tolerances: dict[torch.dtype | None, float] = {torch.float64: _TOLERANCE, torch.float32: _TOLERANCE_FLOAT32}
    if is_quantized(twin):
        tolerances = {None: _TOLERANCE_QUANTIZED}
    for dtype in tolerances:
        try:
            effect, error, rounding = _effect_and_error(twin, original, dim, dtype)
            break
        except BackboneError as refusal:
            raise BackboneError(f"{refusal} {way_out}") from refusal
        except Exception as raised:  # of whatever a block does
            failure = raised
    else:
        raise BackboneError(
            f"{name} cannot be run on tokens alone, so whether prompts work in it is not known: {failure}. {way_out}"
        ) from failure
    allowed = max(tolerances[dtype] * effect, min(2 * rounding, _TOLERANCE_FLOAT32 * effect))
    if not effect > 0 or not error <= allowed:
        raise BackboneError(
            f"Prompts do not work in {name}: compared with token concatenation it is off by {error:.2g} where the "
            f"prompt's whole effect is {effect:.2g}. {way_out}"
        )


def _name(original: Any) -> str:
    return f"{original.__name__} of {original.__module__}"


def _copy(block: nn.Module) -> nn.Module:
    """A deep copy, where modules may keep results of an earlier forward: attention maps, pruned weights."""
    kept = (value for part in block.modules() for value in vars(part).values() if isinstance(value, Tensor))
    return copy.deepcopy(block, {id(value): value.detach().clone() for value in kept if not value.is_leaf})


def is_quantized(module: nn.Module) -> bool:
    """Whether a module holds weights that cannot be drawn anew: integers, packed ones, tensor subclasses."""
    packed = any(hasattr(part, "_packed_params") for part in module.modules())
    return packed or not all(_is_plain(parameter) for parameter in module.parameters())


def _is_plain(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and type(parameter.data) is Tensor


def _effect_and_error(twin: Any, original: Any, dim: int, dtype: torch.dtype | None) -> tuple[float, float, float]:
    """Norm of what the prompt changes (0 where lost in rounding), of the difference to concatenation, of rounding.

    Rounding is how far the original class differs from itself when the prompt moves from the front to the end: a
    norm or a softmax may compute in float32 whatever it is given.
    """
    draw = partial(torch.randn, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64, device="cpu")
    if dtype is not None:
        twin.to("cpu", dtype)
        for parameter in twin.parameters():
            width = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.copy_(draw(parameter.shape) / width**0.5)
    reference = next(parameter for parameter in twin.parameters() if _is_plain(parameter))
    x, prompt = (draw((2, count, dim)).to(reference.device, reference.dtype) for count in (_TOKENS, 3))
    few, all_of_them = (_arguments(twin, original, reference, count) for count in (_TOKENS, _TOKENS + 3))
    with torch.autocast(reference.device.type, enabled=False):
        plain = original.forward(twin, x, **few)
        if not isinstance(plain, Tensor):
            raise BackboneError(f"{_name(original)} answers with a {type(plain).__name__} where others do with tokens.")
        # In front, where a prompted block has them behind: a block that looks at positions is found out.
        expected = original.forward(twin, torch.cat([prompt, x], 1), **all_of_them)[:, 3:].double()
        behind = original.forward(twin, torch.cat([x, prompt], 1), **all_of_them)[:, :_TOKENS]
        got = twin.forward(x, prompt=prompt, **few).double()
    effect, error, rounding = (float((tokens.double() - expected).norm()) for tokens in (plain, got, behind))
    return (effect if effect > _ROUNDING * float(expected.norm()) else 0.0), error, rounding


def _blind_to_positions(twin: nn.Module) -> None:
    """Switch off what looks at positions, for which prompts have none, and what a copy on the CPU stumbles over."""
    part: Any
    for part in twin.modules():
        for name in _BIASES:
            if getattr(part, name, None) is not None:
                setattr(part, name, None)
        if isinstance(part, nn.MultiheadAttention):
            part.batch_first = True
        if hasattr(part, "use_clipped"):  # clamps whose bounds are buffers, unknown on the meta device
            part.use_clipped = False


def _arguments(twin: Any, original: Any, reference: Tensor, count: int) -> dict[str, Any]:
    """Masks that mask nothing and rotations by no angle, where a block cannot do without them."""
    heads = (getattr(part, "head_dim", None) for part in twin.modules())
    width = next((head for head in heads if isinstance(head, int)), 1)
    ones, zeros = reference.new_ones(count, width), reference.new_zeros(count, width)
    known = {
        **dict.fromkeys(("attention_mask", "causal_attention_mask")),
        "position_embeddings": (ones, zeros),
        "rope_cos": ones[None],
        "rope_sin": zeros[None],
    }
    names = list(inspect.signature(original.forward).parameters)[2:]
    return {name: known[name] for name in names if name in known}


def gradient_gap(block: nn.Module, dim: int) -> str | None:
    """The class in a prompted block through which no gradient passes, as through integer arithmetic; None if none.

    Only quantized blocks are looked through: what else a ViT is made of is differentiable.
    """
    if not is_quantized(block):
        return None
    gaps: list[str] = []

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        given = [value for value in args if isinstance(value, Tensor) and value.requires_grad]
        if not given or not isinstance(out, Tensor):
            return
        # torch.ao's outputs ask for a gradient and then give none, with a warning.
        reached = (
            torch.autograd.grad(out.sum(), given, retain_graph=True, allow_unused=True) if out.requires_grad else []
        )
        if not reached or any(gradient is None for gradient in reached):
            gaps.append(f"{type(module).__name__} of {type(module).__module__}")

    twin = _copy(block).eval()
    handles = [part.register_forward_hook(note) for part in twin.modules() if part is not twin]
    try:
        reference = next(parameter for parameter in twin.parameters() if _is_plain(parameter))
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = torch.randn(2, 5, dim, generator=torch.Generator().manual_seed(0)).to(reference)
            twin(tokens.requires_grad_(), prompt=tokens[:, :3], **_arguments(twin, twin.original, reference, 5))
    finally:
        for handle in handles:
            handle.remove()
    return gaps[0] if gaps else None
