"""Self-check of prompted blocks: compares them with token concatenation on random tokens.

A new version of a library that changes its blocks then raises an error in `wrap` instead of silently changing outputs.
Not here: how a block takes prompts (`lpt_peft.prompting`).
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

_TOLERANCE = 1e-6  # relative to the effect of the prompt, in float64 with random weights
_TOLERANCE_FLOAT32 = 1e-3  # upper limit for blocks that compute in float32 whatever the input
_TOLERANCE_QUANTIZED = 0.3  # the same for quantized weights, where activations are rounded jointly for all tokens
_ROUNDING = 1e-9  # relative to the tokens: smaller effects count as 0
_TOKENS = 67  # larger than a window of 8 x 8, and prime, so that no window divides it
_REPORT = "Its library may have a version that is not supported: see pyproject.toml, or report it."
_BIASES = ("relative_position_bias_table", "rel_pos", "relative_position_bias")  # None turns them off


@torch.no_grad()
def check_block(block: nn.Module, original: Any, dim: int, *, hint: str = "") -> None:
    """Check on random tokens that a prompted block equals the original block with appended prompt tokens.

    The original class runs on `[P; x]` and outputs of `P` are dropped, both without positions; the prompt must have an
    effect. The check uses a copy in eval mode, in float64 with random weights, because the actual weights may hide the
    prompt (a new LayerScale of 1e-6 in bfloat16, a projection initialized to 0) or be on the meta device. Blocks that
    do not support float64 run in float32, quantized blocks with their own weights.

    Args:
        block: A block with its prompted class.
        original: Its class before `wrap`.
        dim: Width of its tokens.
        hint: What to build or use instead, for the message.

    Raises:
        BackboneError: Prompts do not work in this class; the message names it.
    """
    name, advice = _name(original), f"{_REPORT} {hint}".rstrip()
    try:
        twin = _copy(block).eval()
    except Exception as error:  # depends on the attributes of the block
        raise BackboneError(
            f"{name} cannot be copied, and prompts are checked on a copy: {error}. Remove the attribute that cannot be "
            f"copied. {hint}".rstrip()
        ) from error
    for part in twin.modules():
        if hasattr(part, "_hf_hook"):  # accelerate's offloading, which would load the actual weights
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
            effect, deviation, rounding = _effect_and_deviation(twin, original, dim, dtype)
            break
        except BackboneError as refusal:
            raise BackboneError(f"{refusal} {advice}") from refusal
        except Exception as error:  # depends on the block
            failure = error
    else:
        raise BackboneError(
            f"{name} cannot be run on tokens alone, so prompts cannot be checked: {failure}. {advice}"
        ) from failure
    allowed = max(tolerances[dtype] * effect, min(2 * rounding, _TOLERANCE_FLOAT32 * effect))
    if not effect > 0 or not deviation <= allowed:
        raise BackboneError(
            f"Prompts do not work in {name}: the difference to token concatenation is {deviation:.2g}, and the effect "
            f"of the prompt is {effect:.2g}. {advice}"
        )


def _name(original: Any) -> str:
    return f"{original.__name__} of {original.__module__}"


def _copy(block: nn.Module) -> nn.Module:
    """Deep copy that supports modules which keep results of a forward: attention maps, pruned weights."""
    kept = (value for part in block.modules() for value in vars(part).values() if isinstance(value, Tensor))
    return copy.deepcopy(block, {id(value): value.detach().clone() for value in kept if not value.is_leaf})


def is_quantized(module: nn.Module) -> bool:
    """Whether a module holds weights that cannot be drawn at random: integers, packed weights, tensor subclasses."""
    packed = any(hasattr(part, "_packed_params") for part in module.modules())
    return packed or not all(_is_plain(parameter) for parameter in module.parameters())


def _is_plain(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and type(parameter.data) is Tensor


def _effect_and_deviation(twin: Any, original: Any, dim: int, dtype: torch.dtype | None) -> tuple[float, float, float]:
    """Return norms: effect of the prompt (0 if lost in rounding), difference to concatenation, and rounding error.

    The rounding error is the change of the original class when the prompt moves from the front to the end: a norm or a
    softmax may compute in float32 whatever its input.
    """
    draw = partial(torch.randn, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64, device="cpu")
    if dtype is not None:
        twin.to("cpu", dtype)
        for parameter in twin.parameters():
            width = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.copy_(draw(parameter.shape) / width**0.5)
    reference = next(parameter for parameter in twin.parameters() if _is_plain(parameter))
    x, prompt = (draw((2, count, dim)).to(reference.device, reference.dtype) for count in (_TOKENS, 3))
    plain_args, joined_args = (_arguments(twin, original, reference, count) for count in (_TOKENS, _TOKENS + 3))
    with torch.autocast(reference.device.type, enabled=False):
        plain = original.forward(twin, x, **plain_args)
        if not isinstance(plain, Tensor):
            raise BackboneError(f"{_name(original)} returns a {type(plain).__name__} instead of tokens.")
        # A prompted block appends the prompt; here it comes first, which detects blocks that depend on positions.
        expected = original.forward(twin, torch.cat([prompt, x], 1), **joined_args)[:, 3:].double()
        appended = original.forward(twin, torch.cat([x, prompt], 1), **joined_args)[:, :_TOKENS]
        actual = twin.forward(x, prompt=prompt, **plain_args).double()
    effect, deviation, rounding = (float((tokens.double() - expected).norm()) for tokens in (plain, actual, appended))
    return (effect if effect > _ROUNDING * float(expected.norm()) else 0.0), deviation, rounding


def _blind_to_positions(twin: nn.Module) -> None:
    """Turn off relative positions, which prompts do not have, and what a copy on the CPU does not support."""
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
    """Arguments that a block requires: masks without masked tokens and rotations by the angle 0."""
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
    """Return the class in a prompted block that passes no gradient, such as integer arithmetic, or None.

    Only quantized blocks are checked, because other blocks are differentiable.
    """
    if not is_quantized(block):
        return None
    gaps: list[str] = []

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        given = [value for value in args if isinstance(value, Tensor) and value.requires_grad]
        if not given or not isinstance(out, Tensor):
            return
        # Outputs of torch.ao require a gradient, but give None, with a warning.
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
