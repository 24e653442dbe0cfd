"""Per-row A-GCL with a closed-form gradient.

`agcl_rows` uses the closed form in eager mode and plain differentiable operations elsewhere. Not here: input validation
(`checks.py`) and reductions (`agcl.py`, `lpt.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LOGIT_LIMIT = 1e18  # larger differences of logits, summed over a batch, could overflow float32
_BLOCK = 2**18  # logits per block on a CPU, so that temporaries fit in the cache
_LARGEST_PRODUCT = 16  # integer exponents up to this use multiplications, faster than pow on a CPU
_NOISE_STD = 1 / 3  # the clamp to [-1, 1] is at three standard deviations


class Noise(Enum):
    """Noise other than a given tensor."""

    NONE = "none"
    DRAW = "draw"  # from torch's default generator


@dataclass(frozen=True)
class Branches:
    """Settings of a batch that consists of equal, consecutive branches.

    Attributes:
        gamma_pos: Exponent of the target's weight in each branch.
        gamma_neg: Exponent of the other classes' weights in each branch.
        scale, margin, noise_scale, label_smoothing: See `agcl_loss`.
        delta: `(C,)` in the dtype of the loss, see `agcl_loss`.
    """

    gamma_pos: tuple[float, ...]
    gamma_neg: tuple[float, ...]
    scale: float
    margin: float
    noise_scale: float
    label_smoothing: float
    delta: Tensor


def agcl_rows(logits: Tensor, target: Tensor, noise: Tensor | Noise, branches: Branches) -> Tensor:
    """Compute A-GCL of each row; see `agcl_loss` for the equation.

    Args:
        logits: `(B, C)`, any floating dtype.
        target: `(B,)` int64, 0 to `C - 1`. A label out of range fails torch's own assertion on a CUDA device.
        noise: `(B, C)`, or whether to draw noise.
        branches: The settings; `B` is a multiple of the number of branches.

    Returns:
        `(B,)` in the dtype of `branches.delta`.
    """
    traced = torch.compiler.is_compiling() or functorch_is_active()
    if noise is Noise.DRAW and (traced or logits.device.type != "cpu"):
        noise = _draw(logits, branches.delta.dtype)  # on a CPU, each block draws its noise
    if traced:
        return _definition(logits, target, noise, branches)
    if torch.is_grad_enabled() and logits.requires_grad:
        loss: Tensor = _Rows.apply(logits, target, noise, branches)
        return loss
    return _in_blocks(logits, target, noise, branches, gradient=None)


def functorch_is_active() -> bool:
    """Whether a torch.func transform is active; its tensors have no values and allow no in-place operations."""
    return bool(torch._C._are_functorch_transforms_active())


def _draw(logits: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Draw clamped Gaussian noise with the shape of `logits`."""
    noise = torch.empty_like(logits, dtype=dtype, requires_grad=False)
    return noise.normal_(0, _NOISE_STD, generator=generator).clamp(-1, 1)


def _definition(logits: Tensor, target: Tensor, noise: Tensor | Noise, branches: Branches) -> Tensor:
    """Compute the loss with differentiable operations, for compilers, torch.func and second derivatives."""
    delta = branches.delta
    gamma_pos, gamma_neg = (_column(gammas, logits, delta.dtype) for gammas in (branches.gamma_pos, branches.gamma_neg))
    label = target[:, None]
    z = logits.to(delta.dtype).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT)
    if isinstance(noise, Tensor):
        z = z - branches.scale * branches.noise_scale * noise.to(delta.dtype).abs() * delta
    # 1 - p_y is 0 once p_y rounds to 1, and its power then has no finite gradient. Log-odds avoid this:
    # log p_y = logsigmoid(odds), log(1 - p_y) = logsigmoid(-odds).
    own = z.gather(1, label) - branches.scale * branches.margin
    z = z.scatter(1, label, -2 * _LOGIT_LIMIT)
    others = z.logsumexp(dim=1, keepdim=True)
    log_other = F.logsigmoid(others - own)
    positive = (gamma_pos * log_other).exp() * F.logsigmoid(own - others)
    log_p = z - (others - log_other)
    weight = (gamma_neg * log_p).exp().scatter(1, label, 0.0)
    negative = (weight * log_p).sum(dim=1, keepdim=True)
    uniform = branches.label_smoothing / logits.shape[1]
    return -((1 - branches.label_smoothing + uniform) * positive + uniform * negative).squeeze(1)


class _Rows(torch.autograd.Function):
    """Loss and gradient in one pass; second derivatives use `_definition` with the same noise."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, noise: Tensor | Noise, branches: Branches) -> Tensor:
        gradient = torch.empty_like(logits, dtype=branches.delta.dtype, memory_format=torch.contiguous_format)
        ctx.branches, ctx.noise = branches, None if isinstance(noise, Tensor) else noise
        ctx.random_state = torch.get_rng_state() if noise is Noise.DRAW else None
        loss = _in_blocks(logits, target, noise, branches, gradient)
        ctx.save_for_backward(logits, target, noise if isinstance(noise, Tensor) else None, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, noise, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            if ctx.noise is Noise.DRAW:
                noise = _draw_again(logits, ctx.branches, ctx.random_state)
            elif ctx.noise is Noise.NONE:
                noise = Noise.NONE
            loss = _definition(logits, target, noise, ctx.branches)
            (slope,) = torch.autograd.grad(loss, logits, upstream[0], create_graph=True)
        else:
            slope = torch.empty_like(logits, memory_format=torch.contiguous_format)
            torch.mul(gradient, upstream[0][:, None], out=slope)
        return slope, None, None, None


def _in_blocks(
    logits: Tensor, target: Tensor, noise: Tensor | Noise, branches: Branches, gradient: Tensor | None
) -> Tensor:
    """Apply `_closed_form` to the batch and fill `gradient`: in blocks of rows on a CPU, all at once on a device."""
    blocks = {
        rows.start: _closed_form(
            logits[rows],
            target[rows, None],
            _noise_of_block(noise, logits, rows, branches.delta.dtype),
            branches,
            gamma_pos=gamma_pos,
            gamma_neg=gamma_neg,
            gradient=None if gradient is None else gradient[rows],
        )
        for rows, gamma_pos, gamma_neg in _blocks(logits, branches)
    }
    return torch.cat([blocks[start] for start in sorted(blocks)])


def _noise_of_block(noise: Tensor | Noise, logits: Tensor, rows: slice, dtype: torch.dtype) -> Tensor | None:
    if isinstance(noise, Tensor):
        return noise[rows]
    return _draw(logits[rows], dtype) if noise is Noise.DRAW else None


def _draw_again(logits: Tensor, branches: Branches, random_state: Tensor) -> Tensor:
    """Repeat the draw of the blocks from the saved generator state."""
    generator = torch.Generator().set_state(random_state)
    dtype = branches.delta.dtype
    blocks = {rows.start: _draw(logits[rows], dtype, generator) for rows, _, _ in _blocks(logits, branches)}
    return torch.cat([blocks[start] for start in sorted(blocks)])


def _blocks(logits: Tensor, branches: Branches) -> Iterator[tuple[slice, float | Tensor, float | Tensor]]:
    """Yield rows and their exponents: numbers for a block within a branch, columns for a block with several branches.

    The last branch comes first, because the results in docs/ were drawn in this order.
    """
    gammas = branches.gamma_pos, branches.gamma_neg
    if logits.device.type != "cpu":
        columns = [_column(values, logits, branches.delta.dtype) for values in gammas]
        yield slice(0, len(logits)), columns[0], columns[1]
        return
    branch = len(logits) // len(branches.gamma_pos)
    step = max(1, _BLOCK // logits.shape[1])
    for index, (gamma_pos, gamma_neg) in reversed(list(enumerate(zip(*gammas, strict=True)))):
        first, end = index * branch, (index + 1) * branch
        for start in range(first, end, step):
            yield slice(start, min(start + step, end)), gamma_pos, gamma_neg


def _closed_form(
    logits: Tensor,
    label: Tensor,
    noise: Tensor | None,
    branches: Branches,
    *,
    gamma_pos: float | Tensor,
    gamma_neg: float | Tensor,
    gradient: Tensor | None,
) -> Tensor:
    """Compute the loss `(R,)` of rows with `label (R, 1)` and write its gradient to `gradient (R, C)` if given.

    With q the softmax without the target, p_j = q_j (1 - p_y) for j != y. Writing P for the positive and N for the
    sum of the negative terms, o for the log-odds of the target and r_j = p_j ** gamma_neg:

        dP/do = w_y (1 - p_y - gamma_pos p_y log p_y),                         do/dz_j = -q_j
        dN/dz_j = [j != y] r_j (gamma_neg log p_j + 1) - p_j S,    S = sum_k r_k (gamma_neg log p_k + 1)
    """
    delta = branches.delta
    uniform = branches.label_smoothing / logits.shape[1]
    certain = 1 - branches.label_smoothing + uniform
    floor = torch.finfo(delta.dtype).tiny ** 0.4  # smaller weights become 0, because denormal numbers are slow on a CPU

    z = logits.to(delta.dtype).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT)
    if noise is not None:
        z.addcmul_(noise.to(delta.dtype).abs(), delta, value=-branches.scale * branches.noise_scale)
    own = z.gather(1, label) - branches.scale * branches.margin
    z.scatter_(1, label, -2 * _LOGIT_LIMIT)
    largest = z.amax(1, keepdim=True)
    q = torch.softmax(z, 1) if gradient is None else torch.softmax(z, 1, out=gradient)
    others = largest - q.amax(1, keepdim=True).log_()  # logsumexp, from the largest softmax = 1 / sum

    odds = own - others
    log_own, log_other = F.logsigmoid(odds), F.logsigmoid(-odds)
    weight = (gamma_pos * log_other).exp_()
    log_p = z.sub_(others - log_other)
    common = F.threshold((gamma_neg * log_other).exp_(), floor, 0.0)  # p_j ** gamma = q_j ** gamma * common
    r = _power(q, gamma_neg, floor).scatter_(1, label, 0.0)
    r_log_p = log_p.mul_(r)
    r_sum, negative = common * r.sum(1, keepdim=True), common * r_log_p.sum(1, keepdim=True)
    loss = -(certain * weight * log_own + uniform * negative).squeeze(1)
    if gradient is None:
        return loss

    p_own, p_other = log_own.exp(), log_other.exp()
    slope = certain * weight * (p_other - gamma_pos * p_own * log_own)
    total = uniform * (gamma_neg * negative + r_sum)
    common *= -uniform
    gradient.mul_(slope + total * p_other).addcmul_(r, common).addcmul_(r_log_p, gamma_neg * common)
    gradient.scatter_(1, label, total * p_own - slope)
    return loss


def _power(q: Tensor, gamma: float | Tensor, floor: float) -> Tensor:
    """Compute `q ** gamma` of probabilities; for a number `gamma`, results below `floor` become 0."""
    if isinstance(gamma, Tensor):
        return q.pow(gamma)
    if gamma == 0:
        return torch.ones_like(q)
    base = F.threshold(q, floor ** (1 / gamma), 0.0)
    if gamma > _LARGEST_PRODUCT or gamma != int(gamma):
        return base.pow_(gamma)
    power = base
    for bit in f"{int(gamma):b}"[1:]:
        power = power.square()
        if bit == "1":
            power = power.mul_(base)
    return power


def _column(gammas: tuple[float, ...], logits: Tensor, dtype: torch.dtype) -> float | Tensor:
    """Exponents `(B, 1)` of the rows, or a number if all branches share it."""
    if len(set(gammas)) == 1:
        return gammas[0]
    branch = len(logits) // len(gammas)
    column = logits.new_empty((len(logits), 1), dtype=dtype)
    for index, gamma in enumerate(gammas):
        column[index * branch : (index + 1) * branch] = gamma
    return column
