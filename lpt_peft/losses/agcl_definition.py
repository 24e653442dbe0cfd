"""A-GCL as differentiable operations, for class indices and for probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_LIMIT = 1e18  # larger differences of logits, summed over a batch, could overflow float32
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


def draw_noise(logits: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Draw clamped Gaussian noise with the shape of `logits`."""
    noise = torch.empty_like(logits, dtype=dtype, requires_grad=False)
    return noise.normal_(0, _NOISE_STD, generator=generator).clamp(-1, 1)


def agcl_of_labels(logits: Tensor, target: Tensor, noise: Tensor | Noise, branches: Branches) -> Tensor:
    """Compute the loss `(B,)` for `target (B,)`, for compilers, torch.func and second derivatives."""
    dtype = branches.delta.dtype
    gamma_pos, gamma_neg = (gamma_column(gammas, logits, dtype) for gammas in (branches.gamma_pos, branches.gamma_neg))
    label = target[:, None]
    z = _noisy_logits(logits, noise, branches)
    # 1 - p_y is 0 once p_y rounds to 1, and its power then has no finite gradient. Log-odds avoid this:
    # log p_y = logsigmoid(odds), log(1 - p_y) = logsigmoid(-odds).
    own = z.gather(1, label) - branches.scale * branches.margin
    z = z.scatter(1, label, -2 * LOGIT_LIMIT)
    others = z.logsumexp(dim=1, keepdim=True)
    log_other = F.logsigmoid(others - own)
    positive = _exp(gamma_pos * log_other) * F.logsigmoid(own - others)
    log_p = z - (others - log_other)
    weight = _exp(gamma_neg * log_p).scatter(1, label, 0.0)
    negative = (weight * log_p).sum(dim=1, keepdim=True)
    uniform = branches.label_smoothing / logits.shape[1]
    return -((1 - branches.label_smoothing + uniform) * positive + uniform * negative).squeeze(1)


def _exp(exponent: Tensor) -> Tensor:
    """Exponential that is at least `exp(-80)`, because denormal numbers are slow on a CPU."""
    return exponent.clamp_min(-80.0).exp()


def _noisy_logits(logits: Tensor, noise: Tensor | Noise, branches: Branches) -> Tensor:
    """Logits `(B, C)` in the dtype of the loss, lowered by the noise."""
    z = logits.to(branches.delta.dtype).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    if isinstance(noise, Tensor):
        z = z - branches.scale * branches.noise_scale * noise.to(z.dtype).abs() * branches.delta
    return z


def agcl_of_probabilities(logits: Tensor, target: Tensor, noise: Tensor | Noise, branches: Branches) -> Tensor:
    """Compute the expected loss `(B,)` over labels drawn from `target (B, C)`, in O(C) per row.

    Let q be the softmax without the margin, `r_j = q_j ** gamma_neg` and
    `o_y = log q_y - log(1 - q_y) - scale * margin`. For the label y, `p_y = sigmoid(o_y)` and, for j != y,
    `log p_j = log q_j + k_y` with `k_y = log(1 - p_y) - log(1 - q_y)`. The sum over j != y is a difference of sums over
    all classes:

        sum_j p_j ** gamma_neg * log p_j = exp(gamma_neg * k_y) * (sum_j r_j * log q_j - r_y * log q_y
                                                                   + k_y * (sum_j r_j - r_y))

    The differences are accurate unless y is the most probable class, for which the loss comes from `agcl_of_labels`.
    """
    dtype = branches.delta.dtype
    gamma_pos, gamma_neg = (gamma_column(gammas, logits, dtype) for gammas in (branches.gamma_pos, branches.gamma_neg))
    z = _noisy_logits(logits, noise, branches)
    top = z.argmax(1, keepdim=True)
    log_q = z.log_softmax(1)
    log_rest = (-_exp(log_q).scatter(1, top, 0.0)).log1p()  # log(1 - q_y); q_y <= 1/2 without the top class
    odds = log_q - log_rest - branches.scale * branches.margin
    log_other = F.logsigmoid(-odds)
    positive = _exp(gamma_pos * log_other) * F.logsigmoid(odds)
    shift = log_other - log_rest
    r = _exp(gamma_neg * log_q)
    r_log_q = r * log_q
    r_rest, r_log_q_rest = r.sum(1, keepdim=True) - r, r_log_q.sum(1, keepdim=True) - r_log_q
    negative = _exp(gamma_neg * shift) * (r_log_q_rest + shift * r_rest)
    uniform = branches.label_smoothing / logits.shape[1]
    losses = -((1 - branches.label_smoothing + uniform) * positive + uniform * negative)
    of_top = agcl_of_labels(logits, top.squeeze(1), noise, branches)
    losses = losses.scatter(1, top, of_top[:, None])

    expected = (target.to(dtype) * losses).sum(1)
    return expected * torch.where(is_distribution(target), 1.0, torch.nan)  # loss and gradient become NaN


def is_distribution(target: Tensor) -> Tensor:
    """Whether each row of `target (B, C)` is non-negative and sums to 1 up to rounding: `(B,)` bool."""
    tolerance = 1e-2 if torch.finfo(target.dtype).eps > 1e-4 else 1e-3
    return (target >= 0).all(1) & ((target.sum(1, dtype=torch.float32) - 1).abs() <= tolerance)


def gamma_column(gammas: tuple[float, ...], logits: Tensor, dtype: torch.dtype) -> float | Tensor:
    """Exponents `(B, 1)` of the rows, or a number if all branches share it."""
    if len(set(gammas)) == 1:
        return gammas[0]
    branch = len(logits) // len(gammas)
    column = logits.new_empty((len(logits), 1), dtype=dtype)
    for index, gamma in enumerate(gammas):
        column[index * branch : (index + 1) * branch] = gamma
    return column
