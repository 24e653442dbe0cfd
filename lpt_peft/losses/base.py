"""Base class of losses that depend on class counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lpt_peft.errors import LPTError
from lpt_peft.losses.agcl_definition import Noise
from lpt_peft.losses.checks import check_settings, checked_class_counts


class ClassCountsLoss(nn.Module):
    """Class counts, the delta of A-GCL derived from them, and settings.

    The settings in `_SETTINGS` and `class_counts` can be assigned at any time. An assigned value is checked like an
    argument, and the buffers that depend on it are updated.
    """

    _SETTINGS: ClassVar[tuple[str, ...]]
    _DERIVED_FROM: ClassVar[tuple[str, ...]] = ("normalize",)  # settings that a buffer depends on
    class_counts: Tensor
    normalize: bool
    _delta: Tensor

    def __init__(self, class_counts: Sequence[int] | Mapping[int, int] | Tensor, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.register_buffer("class_counts", checked_class_counts(class_counts).clone(), persistent=False)
        self.register_buffer("_delta", None, persistent=False)
        self._update_buffers()

    def _update_buffers(self) -> None:
        """Compute the buffers that depend on counts and settings."""
        self._delta = compute_delta(self.class_counts, torch.float32, self.normalize)

    def _delta_in(self, dtype: torch.dtype) -> Tensor:
        """Delta `(C,)`. In float64, which training does not use, it is computed at every call."""
        return self._delta if dtype == torch.float32 else compute_delta(self.class_counts, dtype, self.normalize)

    def _noise_or_default(self, noise: Tensor | None) -> Tensor | Noise:
        """The given noise; None means a draw in `train()` mode and no noise in `eval()` mode."""
        if noise is not None:
            return noise
        return Noise.DRAW if self.training else Noise.NONE

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._SETTINGS:
            check_settings(**{name: value})
            value = float(value) if isinstance(value, np.generic) else value
        elif name == "class_counts":
            value = checked_class_counts(value).clone()
        before: Any = getattr(self, name, None)
        super().__setattr__(name, value)
        if (name in self._DERIVED_FROM or name == "class_counts") and "_delta" in self._buffers:
            try:
                self._update_buffers()
            except LPTError:
                super().__setattr__(name, before)
                raise

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassCountsLoss:
        """Move the buffers for `to()` and `half()`; delta stays float32."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._update_buffers()
        return self

    def extra_repr(self) -> str:
        """Number of classes and settings, for `print(loss)`."""
        settings = {name: getattr(self, name) for name in self._SETTINGS}
        return ", ".join(
            f"{name}={value}" for name, value in {"num_classes": len(self.class_counts), **settings}.items()
        )


def compute_delta(counts: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """Compute `log n_max - log n_j` as `(C,)`; `normalize` scales the largest value to 1. Equal counts give zeros."""
    ratio = (counts.max() - counts).to(dtype) / counts.to(dtype)
    delta = ratio.log1p()  # a difference of logarithms would lose digits
    return delta / delta.max().clamp_min(torch.finfo(dtype).tiny) if normalize else delta
