"""Per-row A-GCL with a closed-form gradient.

Not here: the loss as differentiable operations (`agcl_definition.py`), input validation (`checks.py`) and reductions
(`agcl.py`, `lpt.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt_peft.losses.agcl_definition import (
    LOGIT_LIMIT,
    Branches,
    Noise,
    agcl_of_labels,
    agcl_of_probabilities,
    draw_noise,
    gamma_column,
)

_BLOCK = 2**18  # logits per block on a CPU, so that temporaries fit in the cache
_LARGEST_PRODUCT = 16  # integer exponents up to this use multiplications, faster than pow on a CPU


def agcl_rows(logits: Tensor, target: Tensor, noise: Tensor | Noise, branches: Branches) -> Tensor:
    """Compute A-GCL of each row; see `agcl_loss` for the equation.

    Args:
        logits: `(B, C)`, any floating dtype.
        target: `(B,)` integers, 0 to `C - 1`, or `(B, C)` probabilities. A label out of range fails torch's own
            assertion on a CUDA device; a row that is not a probability distribution has loss NaN.
        noise: `(B, C)`, or whether to draw noise.
        branches: The settings; `B` is a multiple of the number of branches.

    Returns:
        `(B,)` in the dtype of `branches.delta`.
    """
    traced = torch.compiler.is_compiling() or functorch_is_active()
    if noise is Noise.DRAW and (traced or logits.device.type != "cpu" or target.is_floating_point()):
        noise = draw_noise(logits, branches.delta.dtype)  # in the closed form on a CPU, each block draws its noise
    if target.is_floating_point():
        return agcl_of_probabilities(logits, target, noise, branches)
    target = target.long()
    if traced:
        return agcl_of_labels(logits, target, noise, branches)
    if torch.is_grad_enabled() and logits.requires_grad:
        loss: Tensor = _Rows.apply(logits, target, noise, branches)
        return loss
    return _in_blocks(logits, target, noise, branches, gradient=None)


def functorch_is_active() -> bool:
    """Whether a torch.func transform is active; its tensors have no values and allow no in-place operations."""
    return bool(torch._C._are_functorch_transforms_active())


class _Rows(torch.autograd.Function):
    """Loss and gradient in one pass; second derivatives use `agcl_of_labels` with the same noise."""

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
            loss = agcl_of_labels(logits, target, noise, ctx.branches)
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
    return draw_noise(logits[rows], dtype) if noise is Noise.DRAW else None


def _draw_again(logits: Tensor, branches: Branches, random_state: Tensor) -> Tensor:
    """Repeat the draw of the blocks from the saved generator state."""
    generator = torch.Generator().set_state(random_state)
    dtype = branches.delta.dtype
    blocks = {rows.start: draw_noise(logits[rows], dtype, generator) for rows, _, _ in _blocks(logits, branches)}
    return torch.cat([blocks[start] for start in sorted(blocks)])


def _blocks(logits: Tensor, branches: Branches) -> Iterator[tuple[slice, float | Tensor, float | Tensor]]:
    """Yield rows and their exponents: numbers for a block within a branch, columns for a block with several branches.

    The last branch comes first, because the results in docs/ were drawn in this order.
    """
    gammas = branches.gamma_pos, branches.gamma_neg
    if logits.device.type != "cpu":
        columns = [gamma_column(values, logits, branches.delta.dtype) for values in gammas]
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

    z = logits.to(delta.dtype).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    if noise is not None:
        z.addcmul_(noise.to(delta.dtype).abs(), delta, value=-branches.scale * branches.noise_scale)
    own = z.gather(1, label) - branches.scale * branches.margin
    z.scatter_(1, label, -2 * LOGIT_LIMIT)
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
