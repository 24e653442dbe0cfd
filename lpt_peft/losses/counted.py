"""Base of the losses that know class counts: settings checked when assigned, counts and delta as buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lpt_peft.errors import LPTError
from lpt_peft.losses.checks import check_settings, checked_class_counts
from lpt_peft.losses.rows import Noise


class CountedLoss(nn.Module):
    """Holds class counts, the delta of A-GCL derived from them, and settings.

    The settings in `_SETTINGS` and `class_counts` may be assigned at any time: an assignment is checked like an
    argument, and what follows from it is computed anew.
    """

    _SETTINGS: ClassVar[tuple[str, ...]]
    _DERIVED_FROM: ClassVar[tuple[str, ...]] = ("normalize",)  # settings that a buffer is computed from
    class_counts: Tensor
    normalize: bool
    _delta: Tensor

    def __init__(self, class_counts: Sequence[int] | Tensor, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.register_buffer("class_counts", checked_class_counts(class_counts).clone(), persistent=False)
        self.register_buffer("_delta", None, persistent=False)
        self._derive()

    def _derive(self) -> None:
        """Compute the buffers that follow from counts and settings."""
        self._delta = delta_of(self.class_counts, torch.float32, self.normalize)

    def _delta_in(self, dtype: torch.dtype) -> Tensor:
        """Delta `(C,)`; float64, which no training uses, is computed from the counts at every call."""
        return self._delta if dtype == torch.float32 else delta_of(self.class_counts, dtype, self.normalize)

    def _noise_or(self, given: Tensor | None) -> Tensor | Noise:
        """The noise given to the call, else a draw while training and none in eval."""
        if given is not None:
            return given
        return Noise.DRAW if self.training else Noise.NONE

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._SETTINGS:
            check_settings(**{name: value})
        elif name == "class_counts":
            value = checked_class_counts(value).clone()
        before: Any = getattr(self, name, None)
        super().__setattr__(name, value)
        if (name in self._DERIVED_FROM or name == "class_counts") and "_delta" in self._buffers:
            try:
                self._derive()
            except LPTError:
                super().__setattr__(name, before)
                raise

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CountedLoss:
        """Move the buffers, as `to()` and `half()` do; delta stays float32."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._derive()
        return self

    def extra_repr(self) -> str:
        """Number of classes and settings, for `print(loss)`."""
        settings = {name: getattr(self, name) for name in self._SETTINGS}
        return ", ".join(
            f"{name}={value}" for name, value in {"num_classes": len(self.class_counts), **settings}.items()
        )


def delta_of(counts: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """`(C,)`: log n_max - log n_j, with 1 as the largest if `normalize`, all 0 if the counts are equal."""
    ratio = (counts.max() - counts).to(dtype) / counts.to(dtype)
    delta = ratio.log1p()  # log(n_max / n_j), without the cancellation that a difference of logarithms has
    return delta / delta.max().clamp_min(torch.finfo(dtype).tiny) if normalize else delta
