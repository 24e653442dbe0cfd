"""Cosine classifier.

Not here: dropout before the head (`lpt_peft.adapter`) and margins (`lpt_peft.losses`).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt_peft._features import check_features
from lpt_peft._numbers import checked_integer, is_finite_number
from lpt_peft._numerics import cosine
from lpt_peft._tensors import gather_full, read_value, write_value
from lpt_peft.errors import ConfigError, InputError


def cosine_logits(features: Tensor, weight: Tensor, scale: float = 20.0) -> Tensor:
    r"""Compute `logits_j = s * cos(f, w_j)`.

    Args:
        features: Features (B, d), floating point; more leading dimensions are kept.
        weight: Class vectors (C, d), floating point, on the same device.
        scale: Scale `s`. Without it, the softmax over cosines is nearly uniform.

    Returns:
        Logits (B, C): float64 if an input is float64, otherwise float32, also under autocast.

    Raises:
        InputError: `features` or `weight` is not floating point, or the widths or devices differ.

    Source: LPT, Dong et al., ICLR 2023, arXiv 2210.01033.
    """
    check_features("weight", weight, weight.shape[-1], rows="C", hint="pass one vector per class")
    hint = "pass pooled features of the width of the class vectors"
    check_features("features", features, weight.shape[1], rows=None, hint=hint, device=weight.device)
    return scale * cosine(features, weight)


@torch.no_grad()
def class_sums(features: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Sum the features of each class.

    The sums of several batches add up to those of the data set, so class means need no memory for all features.

    Args:
        features: Features (B, d), floating point.
        target: Classes (B,), an integer dtype, 0 to `num_classes - 1`, on any device.
        num_classes: Number of classes `C`.

    Returns:
        Sums (C, d) on the device of the features: float64; float32 on MPS, which has no float64.

    Raises:
        InputError: The shapes do not match, or a class is out of range.

    Example:
        >>> class_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([0, 2, 0]), 3)
        tensor([[6., 8.],
                [0., 0.],
                [3., 4.]], dtype=torch.float64)
    """
    check_features("features", features, features.shape[-1], rows="B", hint="pass one feature per image")
    if target.shape != features.shape[:1] or target.is_floating_point():
        raise InputError(
            f"target must be integers of shape ({len(features)},), a class per feature, not {target.dtype} of shape "
            f"{tuple(target.shape)}."
        )
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < num_classes:
        raise InputError(
            f"target has classes from {int(target.min())} to {int(target.max())}, and the classes are 0 to "
            f"{num_classes - 1}."
        )
    wide = torch.float32 if features.device.type == "mps" else torch.float64
    sums = features.new_zeros(num_classes, features.shape[1], dtype=wide)
    return sums.index_add_(0, target.to(features.device, torch.int64), features.to(wide))


class CosineClassifier(nn.Module):
    """Linear classifier on normalised features with normalised class vectors: see `cosine_logits`.

    Args:
        dim: Width `d` of the features.
        num_classes: Number of classes `C`.
        scale: Logit scale `s`, a constant.

    Attributes:
        weight: Class vectors (C, d), initialized with random unit vectors. Only their directions matter.

    Raises:
        ConfigError: A size is not an integer of at least 1, or the scale is not a number greater than 0.

    Example:
        >>> head = CosineClassifier(dim=8, num_classes=3)
        >>> logits = head(torch.randn(4, 8))
        >>> logits.shape, bool((logits.abs() <= 20.001).all())
        (torch.Size([4, 3]), True)
    """

    def __init__(self, dim: int, num_classes: int, scale: float = 20.0) -> None:
        super().__init__()
        checked_integer("dim", dim, 1)
        checked_integer("num_classes", num_classes, 1)
        if not is_finite_number(scale) or scale <= 0:
            raise ConfigError(f"scale={scale!r} must be a finite number greater than 0; the usual value is 20.")
        self.scale = float(scale)
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new class vectors from torch's default generator."""
        with torch.no_grad():
            self.weight.copy_(F.normalize(torch.randn_like(self.weight), dim=-1))

    @torch.no_grad()
    def init_class_means(self, sums: Tensor) -> list[int]:
        """Set the class vectors to normalized class means of features, which have the direction of their sums.

        The mean norm of the class vectors does not change, so the learning rate keeps its meaning.

        Args:
            sums: Sums of the features of each class (C, d), floating point: see `class_sums`.

        Returns:
            Classes whose vector did not change, because they have no image or their features cancel.

        Raises:
            InputError: The shape is wrong, or a value is not finite.

        Source: LIFT, "Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts", Shi et al., ICML 2024.
        """
        weight = gather_full(read_value(self, "weight"))
        hint = "pass the class_sums of training features"
        check_features("sums", sums, weight.shape[1], rows="C", hint=hint)
        if len(sums) != len(weight):
            raise InputError(f"sums has {len(sums)} rows, and the classifier {len(weight)} classes: {hint}.")
        if not bool(sums.isfinite().all()):
            raise InputError(f"sums contain NaN or infinity: {hint}, computed on valid images.")
        norms = sums.norm(dim=-1, keepdim=True).to(weight.device)
        directions = sums.to(weight.device) / norms
        rows = (directions * weight.norm(dim=-1).mean()).to(weight.dtype)
        write_value(self, "weight", torch.where(norms > 0, rows, weight))
        return [int(label) for label in (norms[:, 0] == 0).nonzero()]

    @property
    def bias(self) -> Tensor:
        """Empty tensor (0,) with a warning, for scripts that modify the bias of the head."""
        warnings.warn(
            "A cosine head has no bias, and its logits depend only on the directions of its weight: scaling the weight "
            "or filling the bias (timm's --head-init-scale, --head-init-bias) does not change them.",
            UserWarning,
            stacklevel=2,
        )
        return self.weight.new_empty(0)

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits (B, C) of features (B, d)."""
        return cosine_logits(features, self.weight, self.scale)

    if TYPE_CHECKING:  # torch's own __call__ returns Any
        __call__ = forward

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        classes, dim = self.weight.shape
        return f"dim={dim}, num_classes={classes}, scale={self.scale:g}"
