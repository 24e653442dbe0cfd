"""Asymmetric Gaussian-clouded logit loss (A-GCL): `agcl_loss` and `AGCLLoss`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lpt_peft.losses.agcl_definition import Branches, Noise
from lpt_peft.losses.agcl_rows import agcl_rows
from lpt_peft.losses.base import ClassCountsLoss, compute_delta
from lpt_peft.losses.checks import Reduction, check_batch, check_settings, counts_for_batch, loss_dtype, reduce_rows


def agcl_loss(
    logits: Tensor,
    target: Tensor,
    class_counts: Sequence[int] | Mapping[int, int] | Tensor,
    noise: Tensor | None = None,
    *,
    scale: float = 20.0,
    margin: float = 0.1,
    noise_scale: float = 0.5,
    gamma_pos: float = 0.0,
    gamma_neg: float = 4.0,
    label_smoothing: float = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the asymmetric Gaussian-clouded logit loss (A-GCL) of LPT, arXiv 2210.01033.

    With `s = scale`, `mu = margin`, `nu = noise_scale`, `a = label_smoothing` and `C` classes of `n_j` training images:

        delta_j = (log n_max - log n_j) / max_i (log n_max - log n_i)
        z_j     = logits_j - s * (nu * |noise_j| * delta_j + mu * [j = y])
        p       = softmax(z)
        loss    = - sum_j ((1 - a) * [j = y] + a / C) * w_j * log p_j
        w_y     = (1 - p_y) ** gamma_pos,   w_j = p_j ** gamma_neg for j != y

    The noise lowers the logits of rare classes more than those of frequent classes. Gradients flow through the weights
    `w`; an exponent of 0 makes a weight exactly 1. With margin, noise, exponents and smoothing at 0, A-GCL equals
    cross-entropy.

    The loss is computed in float32 or float64, also under autocast, from log-probabilities and log-odds: loss and
    gradient are finite for all finite logits. Logits are clamped to +-1e18; NaN logits give NaN without an error.

    Args:
        logits: `(B, C)`, any floating dtype: `scale` times the cosines.
        target: `(B,)`, any integer dtype: class indices, 0 to `C - 1`. Or `(B, C)`, floating point: probabilities, for
            which the loss is the expectation over labels drawn from them, `sum_y target_y * loss(y)`. On a CPU, a label
            out of range and a row that is not a distribution are errors. A GPU would have to synchronize for a check:
            there, torch's own device assertion fails for the label, and the loss of the row is NaN.
        class_counts: `(C,)` integers of at least 1: training images of each class; or a mapping from label to count. If
            all are equal, delta is 0. The counts are checked at every call, which synchronizes if the tensor is on a
            GPU; `AGCLLoss` checks them once.
        noise: `(B, C)`: a Gaussian draw clamped to [-1, 1], without gradient. None means no noise.
        scale: Scale `s` of the cosine classifier. It converts margin and noise, which are cosines, into logits.
        margin: Amount by which the target's cosine must exceed the others.
        noise_scale: Largest amount that the noise subtracts from a cosine, reached for the rarest class.
        gamma_pos: Exponent of the target's weight. Larger values reduce the loss of easy images.
        gamma_neg: Exponent of the other classes' weights. They act only through label smoothing, so the effect is weak.
        label_smoothing: Fraction `a` of the target distribution that is uniform, 0 to 1.
        normalize: Divide delta by its largest value. The paper's equation does not.
        reduction: "mean" over the batch, "sum" or "none".

    Returns:
        A scalar, or `(B,)` for reduction "none"; float64 where the logits are, else float32.

    Raises:
        InputError: Counts, labels or shapes do not follow the rules above.
        ConfigError: A setting is out of its range.

    Example:
        >>> import torch
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
    counts = counts_for_batch(logits, target, class_counts, noise=noise)
    delta = compute_delta(counts, loss_dtype(logits), normalize)
    branches = Branches((gamma_pos,), (gamma_neg,), scale, margin, noise_scale, label_smoothing, delta)
    return reduce_rows(agcl_rows(logits, target, Noise.NONE if noise is None else noise, branches), reduction)


class AGCLLoss(ClassCountsLoss):
    """A-GCL as a module that draws noise during training.

    In `train()` mode, every call draws one number per logit from a Gaussian with mean 0 and standard deviation 1/3 (the
    paper's N(0, 1/3) gives the standard deviation, not the variance), clamped to [-1, 1]. The draw comes from torch's
    default generator of the device, as in `nn.Dropout`. In `eval()` mode there is no noise, but the margin stays. A
    `noise` passed to the call is used in both modes.

    The class counts are a non-persistent buffer: `.to(device)` moves them, `.half()` leaves them exact. Every setting
    is an attribute that can be assigned later; the new value is checked.

    Args:
        class_counts: `(C,)` integers of at least 1: training images of each class; or a mapping from label to count.
        scale: Scale of the cosine classifier. See `agcl_loss` for this and all settings below.
        margin: Amount by which the target's cosine must exceed the others.
        noise_scale: Largest amount that the noise subtracts from a cosine.
        gamma_pos: Exponent of the target's weight. LPT uses 0 for class-balanced batches, 0.5 for others.
        gamma_neg: Exponent of the other classes' weights. LPT uses 4 for class-balanced batches, 8 for others.
        label_smoothing: Fraction of the target distribution that is uniform.
        normalize: Divide delta by its largest value.
        reduction: "mean" over the batch, "sum" or "none".

    Raises:
        InputError: A class count is not an integer of at least 1; the message names the class.
        ConfigError: A setting is out of its range.

    Example:
        >>> import torch
        >>> criterion = AGCLLoss(class_counts=[500, 60, 7]).eval()
        >>> criterion(20 * torch.tensor([[0.3, 0.1, 0.2]]), torch.tensor([0]))
        tensor(0.7093)
    """

    _SETTINGS: ClassVar[tuple[str, ...]] = (
        "scale",
        "margin",
        "noise_scale",
        "gamma_pos",
        "gamma_neg",
        "label_smoothing",
        "normalize",
        "reduction",
    )

    def __init__(
        self,
        class_counts: Sequence[int] | Mapping[int, int] | Tensor,
        *,
        scale: float = 20.0,
        margin: float = 0.1,
        noise_scale: float = 0.5,
        gamma_pos: float = 0.0,
        gamma_neg: float = 4.0,
        label_smoothing: float = 0.1,
        normalize: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_counts, normalize)
        self.scale = scale
        self.margin = margin
        self.noise_scale = noise_scale
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.label_smoothing = label_smoothing
        self.reduction: Reduction = reduction
        self._update_buffers()

    if TYPE_CHECKING:  # nn.Module's own __call__ returns Any

        def __call__(self, logits: Tensor, target: Tensor, noise: Tensor | None = None) -> Tensor:
            """See `forward`."""

    def forward(self, logits: Tensor, target: Tensor, noise: Tensor | None = None) -> Tensor:
        """Compute the loss of `logits (B, C)` for `target`; `noise (B, C)` replaces the draw. See `agcl_loss`."""
        check_batch(logits, target, noise, self.class_counts)
        branches = Branches(
            (self.gamma_pos,),
            (self.gamma_neg,),
            self.scale,
            self.margin,
            self.noise_scale,
            self.label_smoothing,
            self._class_values_in(loss_dtype(logits)),
        )
        return reduce_rows(agcl_rows(logits, target, self._noise_or_default(noise), branches), self.reduction)
