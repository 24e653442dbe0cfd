"""Detection of non-finite losses and gradients on the device, without a host read in every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


class DivergenceFlag:
    """Records the first step whose loss or gradient was NaN or infinite.

    The flag stays set. The caller skips that step and all later steps, so that the state is the last finite state
    when the host reads the flag.

    Args:
        device: Of losses and gradients.

    Attributes:
        found_inf: Scalar float32, 1 from the first non-finite step on, else 0; read by torch's fused optimizers.

    Example:
        >>> flag = DivergenceFlag(torch.device("cpu"))
        >>> for step, loss in enumerate([0.5, float("nan"), 0.4]):
        ...     flag.update(step, torch.tensor(loss), [])
        >>> flag.found_inf, flag.first()
        (tensor(1.), (1, nan))
    """

    def __init__(self, device: torch.device) -> None:
        self.found_inf = torch.zeros((), device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._loss = torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, step: int, loss: Tensor, gradients: Sequence[Tensor]) -> None:
        """Check a step before its parameter update.

        Args:
            step: Number of the step.
            loss: Scalar.
            gradients: All gradients; empty if they are checked elsewhere, as by a gradient scaler.
        """
        finite = loss.isfinite()
        if gradients:
            finite = finite & get_total_norm(gradients, torch.inf).isfinite()  # squares of a 2-norm could overflow
        first = ~finite & (self.found_inf == 0)
        self._step.copy_(torch.where(first, step, self._step))
        self._loss = torch.where(first, loss, self._loss)
        self.found_inf.masked_fill_(first, 1.0)

    @torch.no_grad()
    def invalidate_(self, gradients: Iterable[Tensor]) -> None:
        """Set gradients to NaN if the flag is set, for optimizers that skip non-finite gradients."""
        factor = torch.where(self.found_inf > 0, torch.nan, 1.0)
        for gradient in gradients:
            gradient.mul_(factor)

    def first(self) -> tuple[int, float] | None:
        """Number and loss of the first non-finite step, or None. Waits for the device."""
        return (int(self._step), float(self._loss)) if bool(self.found_inf) else None
