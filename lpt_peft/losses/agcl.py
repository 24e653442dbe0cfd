"""A-GCL, the asymmetric Gaussian-clouded logit loss: `agcl_loss`, and `AGCLLoss`, which draws the noise.

Not here: the objective of both sampling branches (`lpt.py`) and the checks of what is given (`checks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt_peft.losses.checks import check_batch, check_settings, checked_class_counts, loss_dtype

_NOISE_STD = 1 / 3  # so the clamp to [-1, 1] cuts at three standard deviations
_LOGIT_LIMIT = 1e18  # beyond it, differences of logits and sums over a batch could overflow float32
_SETTINGS = ("scale", "margin", "noise_scale", "gamma_pos", "gamma_neg", "label_smoothing", "normalize", "reduction")


def agcl_loss(
    logits: Tensor,
    target: Tensor,
    class_counts: Sequence[int] | Tensor,
    noise: Tensor | None = None,
    *,
    scale: float = 20.0,
    margin: float = 0.1,
    noise_scale: float = 0.5,
    gamma_pos: float = 0.0,
    gamma_neg: float = 4.0,
    label_smoothing: float = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Asymmetric Gaussian-clouded logit loss (A-GCL) of LPT, arXiv 2210.01033.

    With `s = scale`, `mu = margin`, `nu = noise_scale`, `a = label_smoothing` and `C` classes of `n_j` training images:

        delta_j = (log n_max - log n_j) / max_i (log n_max - log n_i)
        z_j     = logits_j - s * (nu * |noise_j| * delta_j + mu * [j = y])
        p       = softmax(z)
        loss    = - sum_j ((1 - a) * [j = y] + a / C) * w_j * log p_j
        w_y     = (1 - p_y) ** gamma_pos,   w_j = p_j ** gamma_neg for j != y

    The noise lowers the logits of a class the more, the rarer it is; gradients flow through the weights `w`, and an
    exponent of 0 makes them exactly 1. With margin, noise, exponents and smoothing at 0 this is cross entropy.

    Computed in float32 at least, also under autocast, from log-probabilities and log-odds: loss and gradient are
    finite for all finite logits. Logits beyond +-1e18 count as +-1e18; NaN logits are not looked for and give NaN.

    Args:
        logits: `(B, C)`, any floating dtype: `scale` times the cosines.
        target: `(B,)`, any integer dtype: class indices, 0 to `C - 1`. The range is checked, which waits for the
            device; under `torch.compile` it is not.
        class_counts: `(C,)` whole numbers, 1 or more: training images of each class. If all are equal, delta is 0.
        noise: `(B, C)`: a Gaussian draw clamped to [-1, 1]. None means no noise: this function draws none.
        scale: Scale `s` of the cosine classifier. It turns margin and noise, which are cosines, into logits.
        margin: How much larger the target's cosine must be.
        noise_scale: The most that noise takes from a cosine, that of the rarest class.
        gamma_pos: Exponent of the target's weight: the larger, the less an easy image counts.
        gamma_neg: Exponent of the other classes' weights. They act through the label smoothing alone, so weakly.
        label_smoothing: Part `a` of the target distribution that is uniform, 0 to 1.
        normalize: Divide delta by its largest value; the paper's equation prints it undivided.
        reduction: "mean" over the batch, "sum" or "none".

    Returns:
        A scalar, or `(B,)` for reduction "none"; float64 where the logits are, else float32.

    Raises:
        InputError: Counts, labels or shapes break a rule above.
        ConfigError: A setting is out of its range.

    Example:
        >>> logits = 20 * torch.tensor([[0.9, 0.1], [0.4, 0.3]])
        >>> agcl_loss(logits, torch.tensor([0, 1]), class_counts=[100, 5])
        tensor(1.9090)
    """
    check_settings(
        reduction,
        normalize,
        scale=scale,
        margin=margin,
        noise_scale=noise_scale,
        gamma_pos=gamma_pos,
        gamma_neg=gamma_neg,
        label_smoothing=label_smoothing,
    )
    counts = checked_class_counts(class_counts).to(logits.device)
    check_batch(logits, target, noise, num_classes=len(counts))
    dtype = loss_dtype(logits)
    target = target.long()
    is_target = target[:, None] == torch.arange(len(counts), device=logits.device)

    lowered = margin * is_target.to(dtype)
    if noise is not None:
        lowered = lowered + noise_scale * noise.to(dtype).abs() * _delta(counts, dtype, normalize)
    z = logits.to(dtype).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT) - scale * lowered

    # The target's term comes from its log-odds against all other classes, as 1 - p_y is 0 once p_y rounds to 1
    # and its power then has no finite gradient: log p_y = logsigmoid(odds), log(1 - p_y) = logsigmoid(-odds).
    others = z.masked_fill(is_target, -2 * _LOGIT_LIMIT).logsumexp(dim=1)
    odds = z.gather(1, target[:, None]).squeeze(1) - others
    positive = (gamma_pos * F.logsigmoid(-odds)).exp() * F.logsigmoid(odds)
    log_p = z.log_softmax(dim=1)
    negative = ((gamma_neg * log_p).exp() * log_p).masked_fill(is_target, 0.0).sum(dim=1)

    uniform = label_smoothing / len(counts)
    loss = -((1 - label_smoothing + uniform) * positive + uniform * negative)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


class AGCLLoss(nn.Module):
    """`agcl_loss` as a module that draws its noise while training.

    In `train()` every call draws one number per logit from a Gaussian of mean 0 and standard deviation 1/3, which is
    what N(0, 1/3) means in the paper (not the variance), clamped to [-1, 1]; it comes from torch's default generator
    of the device, as in `nn.Dropout`. In `eval()` there is no noise; the margin stays. A `noise` given to the call
    is used in both modes. The counts are a buffer outside the state dict that `.to(device)` moves and `.half()` keeps.

    Args:
        class_counts: `(C,)` whole numbers, 1 or more: training images of each class.
        scale, margin, noise_scale, label_smoothing, normalize, reduction: See `agcl_loss`.
        gamma_pos, gamma_neg: See `agcl_loss`. LPT takes 0 and 4 for class-balanced batches, 0.5 and 8 for others.

    Raises:
        InputError: A class count is not a whole number of at least 1; the message names the class.
        ConfigError: A setting is out of its range.

    Example:
        >>> criterion = AGCLLoss(class_counts=[500, 60, 7]).eval()
        >>> criterion(20 * torch.tensor([[0.3, 0.1, 0.2]]), torch.tensor([0]))
        tensor(0.7093)
    """

    class_counts: Tensor

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        *,
        scale: float = 20.0,
        margin: float = 0.1,
        noise_scale: float = 0.5,
        gamma_pos: float = 0.0,
        gamma_neg: float = 4.0,
        label_smoothing: float = 0.1,
        normalize: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.noise_scale = noise_scale
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.label_smoothing = label_smoothing
        self.normalize = normalize
        self.reduction = reduction
        check_settings(**self._settings())
        self.register_buffer("class_counts", checked_class_counts(class_counts).clone(), persistent=False)

    def forward(self, logits: Tensor, target: Tensor, noise: Tensor | None = None) -> Tensor:
        """Loss of `logits (B, C)` against `target (B,)`; `noise (B, C)` replaces the draw. See `agcl_loss`."""
        if noise is None and self.training:
            noise = (_NOISE_STD * torch.randn_like(logits, dtype=loss_dtype(logits))).clamp(-1, 1)
        return agcl_loss(logits, target, self.class_counts, noise, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SETTINGS}

    def extra_repr(self) -> str:
        """Number of classes and settings, for `print(loss)`."""
        return ", ".join(f"{k}={v}" for k, v in {"num_classes": len(self.class_counts), **self._settings()}.items())


def _delta(counts: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """`(C,)`: log n_max - log n_j, largest 1 if `normalize`, all 0 if the counts are equal."""
    ratio = (counts.max() - counts).to(dtype) / counts.to(dtype)
    delta = ratio.log1p()  # log(n_max / n_j), without the cancellation that a difference of logarithms has
    return delta / delta.max().clamp_min(torch.finfo(dtype).tiny) if normalize else delta
