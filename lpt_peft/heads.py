"""Cosine classifier.

Not here: dropout before the head (`lpt_peft.adapter`) and margins (`lpt_peft.losses`).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt_peft._numerics import cosine
from lpt_peft.errors import ConfigError


def cosine_logits(features: Tensor, weight: Tensor, scale: float = 20.0) -> Tensor:
    r"""Compute `logits_j = s * cos(f, w_j)`.

    Args:
        features: Features (B, d), floating point.
        weight: Class vectors (C, d), floating point.
        scale: Scale `s`. Without it, the softmax over cosines is nearly uniform.

    Returns:
        Logits (B, C): float64 if an input is float64, otherwise float32, also under autocast.

    Source: LPT, Dong et al., ICLR 2023, arXiv 2210.01033.
    """
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
        ConfigError: A size is less than 1.

    Example:
        >>> head = CosineClassifier(dim=8, num_classes=3)
        >>> logits = head(torch.randn(4, 8))
        >>> logits.shape, bool((logits.abs() <= 20.001).all())
        (torch.Size([4, 3]), True)
    """

    def __init__(self, dim: int, num_classes: int, scale: float = 20.0) -> None:
        super().__init__()
        if dim < 1 or num_classes < 1:
            raise ConfigError(f"CosineClassifier needs dim and num_classes of at least 1, not {dim} and {num_classes}.")
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
