"""Input validation for the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lpt_peft._classes import counts_in_order
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.losses.agcl_rows import functorch_is_active

Reduction = Literal["mean", "sum", "none"]


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of the computation: float64 for float64, else float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def checked_class_counts(class_counts: Sequence[int] | Mapping[int, int] | Tensor) -> Tensor:
    """Class counts `(C,)` as int64, sorted by label. The values are checked unless torch.compile is tracing."""
    class_counts = counts_in_order(class_counts)
    try:
        counts = torch.as_tensor(class_counts)
        if counts.dtype == torch.float32 and not isinstance(class_counts, Tensor):
            counts = torch.as_tensor(class_counts, dtype=torch.float64)  # Python floats above 2^24 are exact in float64
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"class_counts must be one integer per class, not {class_counts!r:.50}: {error}.") from error
    if counts.ndim != 1 or len(counts) == 0 or counts.dtype == torch.bool or counts.is_complex():
        raise InputError(
            f"class_counts must be one integer per class, not {counts.dtype} of shape {tuple(counts.shape)}: "
            "use torch.bincount(labels, minlength=num_classes)."
        )
    integers = counts.detach().long()
    if not torch.compiler.is_compiling():
        invalid = integers < 1
        if counts.is_floating_point():
            invalid |= integers != counts  # long() changes NaN, infinity and fractions
        if invalid.any():
            index = int(invalid.nonzero()[0])
            raise InputError(
                f"class_counts[{index}]={counts[index].item()} must be an integer of at least 1, because the loss "
                "takes its logarithm: remove classes without training images from the labels and the head."
            )
    return integers


def check_batch(logits: Tensor, target: Tensor, noise: Tensor | None, num_classes: int) -> None:
    """Check logits (B, C), labels (B,) from 0 to C - 1 and noise (B, C) or None.

    The range of the labels is checked where reading them costs nothing: on a CPU, outside torch.compile and torch.func.
    """
    if not isinstance(logits, Tensor):
        raise InputError(f"logits must be a tensor (B, C), not {type(logits).__name__}: pass output.logits.")
    if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[0] == 0:
        raise InputError(
            f"logits must be floating point (B, C) with B > 0, not {logits.dtype} of shape {tuple(logits.shape)}."
        )
    if logits.shape[1] != num_classes:
        raise InputError(
            f"logits have {logits.shape[1]} columns, but class_counts has {num_classes} entries: pass one per column."
        )
    if target.is_floating_point() and target.ndim == 2:
        raise InputError(
            f"target is {target.dtype} of shape {tuple(target.shape)}, as returned by Mixup and CutMix, but A-GCL is "
            "defined for class indices only: use torch.nn.functional.cross_entropy for soft targets, or do not mix."
        )
    if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
        raise InputError(
            f"target must be class indices of an integer dtype, not {target.dtype}: convert it with .long()."
        )
    if target.shape != logits.shape[:1]:
        raise InputError(f"target must have shape (B,) = {tuple(logits.shape[:1])}, not {tuple(target.shape)}.")
    if noise is not None and noise.shape != logits.shape:
        raise InputError(f"noise must have the shape of logits, {tuple(logits.shape)}, not {tuple(noise.shape)}.")
    if noise is not None and noise.requires_grad:
        raise InputError("noise requires a gradient, but the loss has none with respect to it: pass noise.detach().")
    if can_read_values(target):
        labels = target.long()
        out_of_range = (labels < 0) | (labels >= num_classes)
        if out_of_range.any():
            raise InputError(
                f"target contains the label {labels[out_of_range][0].item()}, but class_counts has the classes 0 to "
                f"{num_classes - 1}: drop rows with ignored labels, or pass counts for all classes."
            )


def can_read_values(tensor: Tensor) -> bool:
    """Whether reading values neither synchronizes a device nor breaks a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not functorch_is_active()


def check_settings(reduction: str = "mean", normalize: bool = True, **numbers: float) -> None:
    """Check that numbers are finite and in range."""
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"reduction={reduction!r} must be 'mean', 'sum' or 'none'.")
    if not isinstance(normalize, bool):
        raise ConfigError(f"normalize={normalize!r} must be True or False.")
    for name, value in numbers.items():
        positive, high = name in ("scale", "epochs"), 1 if name == "label_smoothing" else math.inf
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not 0 <= value <= high or (positive and value == 0):
            rule = "greater than 0" if positive else "from 0 to 1" if high == 1 else "of at least 0"
            raise ConfigError(f"{name}={value!r} must be a finite number {rule}.")
