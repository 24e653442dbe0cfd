"""Validation of features and prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lpt_peft.errors import InputError


def check_features(
    name: str, features: Any, width: int, *, rows: str | None, hint: str, device: torch.device | None = None
) -> None:
    """Check a floating-point tensor of `width` columns.

    Args:
        name: Name of the argument in messages.
        features: The value to check.
        width: Required size of the last dimension.
        rows: Name of the first of two dimensions in messages; None accepts any number of leading dimensions.
        hint: How to obtain such features.
        device: Required device; None accepts any.

    Raises:
        InputError: The type, dtype, shape or device is wrong.
    """
    shape = f"(..., {width})" if rows is None else f"({rows}, {width})"
    if not isinstance(features, Tensor):
        raise InputError(f"{name} must be a tensor {shape}, not {type(features).__name__}: {hint}.")
    dimensions = features.ndim >= 1 if rows is None else features.ndim == 2
    if not features.is_floating_point() or not dimensions or features.shape[-1] != width:
        raise InputError(
            f"{name} must be floating point of shape {shape}, not {features.dtype} of shape {tuple(features.shape)}: "
            f"{hint}."
        )
    if device is not None and features.device != device:
        raise InputError(f"{name} is on {features.device}, but must be on {device}: pass {name}.to({str(device)!r}).")


def check_prompts(prompts: Any, *shapes: tuple[int, ...]) -> None:
    """Check that prompts are floating point of one of the shapes (layers, n, d) and (m, layers, n, d).

    Raises:
        InputError: The type, dtype or shape is wrong.
    """
    if not isinstance(prompts, Tensor) or not prompts.is_floating_point() or tuple(prompts.shape) not in shapes:
        found = f"{prompts.dtype} of shape {tuple(prompts.shape)}" if isinstance(prompts, Tensor) else type(prompts)
        names = {3: "(layers, n, d)", 4: "(m, layers, n, d)"}
        rule = " or ".join(f"{shape}, {names[len(shape)]}" for shape in shapes)
        raise InputError(f"prompts must be floating point of shape {rule}, not {found}.")
