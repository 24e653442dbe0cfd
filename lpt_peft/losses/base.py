"""Base classes of losses with checked settings, and with class counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lpt_peft.errors import LPTError
from lpt_peft.losses.agcl_definition import Noise
from lpt_peft.losses.checks import check_settings, checked_class_counts, checked_class_weights


class CheckedLoss(nn.Module):
    """Settings, and optional class weights, that are checked when they are assigned.

    A subclass with class weights registers the non-persistent buffer `class_weights`.
    """

    _SETTINGS: ClassVar[tuple[str, ...]]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._SETTINGS:
            check_settings(**{name: value})
            value = float(value) if isinstance(value, np.generic) else value
        elif name == "class_weights" and value is not None:
            value = checked_class_weights(value).clone()
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CheckedLoss:
        """Move the buffers for `to()` and `half()`; class weights keep their dtype."""
        weights: Tensor | None = self._buffers.get("class_weights")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved: Tensor | None = self._buffers.get("class_weights")
        if weights is not None and moved is not None and moved.dtype != weights.dtype:
            self._buffers["class_weights"] = weights.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Settings, for `print(loss)`."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self._SETTINGS)


class ClassCountsLoss(CheckedLoss):
    """Class counts, a value per class derived from them (by default the delta of A-GCL), and settings.

    The settings in `_SETTINGS` and `class_counts` can be assigned at any time. An assigned value is checked like an
    argument, and the buffers that depend on it are updated.
    """

    _DERIVED_FROM: ClassVar[tuple[str, ...]] = ("normalize",)  # settings that a buffer depends on
    class_counts: Tensor
    normalize: bool
    _class_values: Tensor

    def __init__(self, class_counts: Sequence[int] | Mapping[int, int] | Tensor, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        self.register_buffer("class_counts", checked_class_counts(class_counts).clone(), persistent=False)
        self.register_buffer("_class_values", None, persistent=False)

    def _compute_class_values(self, dtype: torch.dtype) -> Tensor:
        """Compute a value `(C,)` per class from counts and settings."""
        return compute_delta(self.class_counts, dtype, self.normalize)

    def _update_buffers(self) -> None:
        """Compute the buffers that depend on counts and settings. Each subclass calls it at the end of `__init__`."""
        self._class_values = self._compute_class_values(torch.float32)

    def _class_values_in(self, dtype: torch.dtype) -> Tensor:
        """Values `(C,)` per class. In float64, which training does not use, they are computed at every call."""
        return self._class_values if dtype == torch.float32 else self._compute_class_values(dtype)

    def _noise_or_default(self, noise: Tensor | None) -> Tensor | Noise:
        """The given noise; None means a draw in `train()` mode and no noise in `eval()` mode."""
        if noise is not None:
            return noise
        return Noise.DRAW if self.training else Noise.NONE

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "class_counts":
            value = checked_class_counts(value).clone()
        before: Any = getattr(self, name, None)
        super().__setattr__(name, value)
        if (name in self._DERIVED_FROM or name == "class_counts") and self._buffers.get("_class_values") is not None:
            try:
                self._update_buffers()
            except LPTError:
                super().__setattr__(name, before)
                raise

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassCountsLoss:
        """Move the buffers for `to()` and `half()`; the values per class stay float32."""
        super()._apply(fn, recurse)
        self._update_buffers()
        return self

    def extra_repr(self) -> str:
        """Number of classes and settings, for `print(loss)`."""
        return f"num_classes={len(self.class_counts)}, {super().extra_repr()}"


def compute_delta(counts: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """Compute `log n_max - log n_j` as `(C,)`; `normalize` scales the largest value to 1. Equal counts give zeros."""
    ratio = (counts.max() - counts).to(dtype) / counts.to(dtype)
    delta = ratio.log1p()  # a difference of logarithms would lose digits
    return delta / delta.max().clamp_min(torch.finfo(dtype).tiny) if normalize else delta
