"""Input validation for the losses, and the dtype they compute in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lpt_peft.errors import ConfigError, InputError
from lpt_peft.losses.rows import functorch_is_active

Reduction = Literal["mean", "sum", "none"]


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def checked_class_counts(class_counts: Sequence[int] | Tensor) -> Tensor:
    """`(C,)` int64. Reads the values, except under torch.compile."""
    try:
        given = torch.as_tensor(class_counts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"class_counts must be one integer per class, not {class_counts!r:.50}: {error}.") from error
    if given.ndim != 1 or len(given) == 0 or given.dtype == torch.bool or given.is_complex():
        raise InputError(
            f"class_counts must be one integer per class, not {given.dtype} of shape {tuple(given.shape)}: "
            "use torch.bincount(labels, minlength=num_classes)."
        )
    counts = given.detach().long()
    if not torch.compiler.is_compiling():
        wrong = (counts < 1) | (counts != given)  # NaN, infinity and fractions do not survive long()
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise InputError(
                f"class_counts[{index}]={given[index].item()} must be an integer of at least 1, as the loss takes "
                "its logarithm: leave a class without training images out of the labels and the head."
            )
    return counts


def check_batch(logits: Tensor, target: Tensor, noise: Tensor | None, num_classes: int) -> None:
    """Logits (B, C), labels (B,) from 0 to C - 1, noise (B, C) or None.

    The range of the labels is checked where reading them is free: on a CPU, outside torch.compile and torch.func.
    """
    if not isinstance(logits, Tensor):
        raise InputError(f"logits must be a tensor (B, C), not a {type(logits).__name__}: give output.logits.")
    if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[0] == 0:
        raise InputError(
            f"logits must be floating (B, C) with B > 0, not {logits.dtype} of shape {tuple(logits.shape)}."
        )
    if logits.shape[1] != num_classes:
        raise InputError(
            f"logits have {logits.shape[1]} columns but class_counts {num_classes} classes: give one per class."
        )
    if target.is_floating_point() and target.ndim == 2:
        raise InputError(
            f"target is {target.dtype} of shape {tuple(target.shape)}, as Mixup and CutMix make it, but A-GCL is "
            "defined for class indices only: use torch.nn.functional.cross_entropy for soft targets, or do not mix."
        )
    if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
        raise InputError(f"target must be class indices of an integer dtype, not {target.dtype}: convert by .long().")
    if target.shape != logits.shape[:1]:
        raise InputError(f"target must have shape (B,) = {tuple(logits.shape[:1])}, not {tuple(target.shape)}.")
    if noise is not None and noise.shape != logits.shape:
        raise InputError(f"noise must have the shape of logits, {tuple(logits.shape)}, not {tuple(noise.shape)}.")
    if noise is not None and noise.requires_grad:
        raise InputError("noise requires a gradient, but the loss has none with respect to it: pass noise.detach().")
    if _values_are_free(target):
        labels = target.long()
        outside = (labels < 0) | (labels >= num_classes)
        if outside.any():
            raise InputError(
                f"target holds the label {labels[outside][0].item()}, but class_counts has the classes 0 to "
                f"{num_classes - 1}: drop the rows of ignored labels, or count all classes."
            )


def _values_are_free(tensor: Tensor) -> bool:
    """Whether reading values neither waits for a device nor breaks a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not functorch_is_active()


def check_settings(reduction: str = "mean", normalize: bool = True, **numbers: float) -> None:
    """Finite numbers, each in its range."""
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"reduction={reduction!r} must be 'mean', 'sum' or 'none'.")
    if not isinstance(normalize, bool):
        raise ConfigError(f"normalize={normalize!r} must be True or False.")
    for name, value in numbers.items():
        above_zero, high = name in ("scale", "epochs"), 1 if name == "label_smoothing" else math.inf
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not 0 <= value <= high or (above_zero and value == 0):
            rule = "greater than 0" if above_zero else "from 0 to 1" if high == 1 else "of at least 0"
            raise ConfigError(f"{name}={value!r} must be a finite number {rule}.")
