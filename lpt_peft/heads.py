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
from lpt_peft.errors import ConfigError


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
