"""Input validation, dtype and reduction of the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lpt_peft._classes import counts_in_order
from lpt_peft._numbers import is_finite_number
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.losses.agcl_definition import is_distribution
from lpt_peft.losses.agcl_rows import functorch_is_active

Reduction = Literal["mean", "sum", "none"]


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of the computation: float64 for float64, else float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def reduce_rows(rows: Tensor, reduction: Reduction) -> Tensor:
    """Reduce the losses `(B,)` of the rows."""
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


def checked_class_counts(class_counts: Sequence[int] | Mapping[int, int] | Tensor) -> Tensor:
    """Class counts `(C,)` as int64, sorted by label. The values are checked unless torch.compile is tracing."""
    class_counts = counts_in_order(class_counts)
    if isinstance(class_counts, (list, tuple)) and any(getattr(entry, "ndim", 0) for entry in class_counts):
        raise InputError(
            f"class_counts must be one integer per class, not a {type(class_counts).__name__} of arrays or tensors: "
            "use torch.bincount(labels, minlength=num_classes)."
        )
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


def checked_class_weights(class_weights: Tensor) -> Tensor:
    """Class weights `(C,)` as a floating-point tensor. The values are checked where reading them costs nothing."""
    if not isinstance(class_weights, Tensor) or class_weights.ndim != 1 or not class_weights.is_floating_point():
        found = type(class_weights).__name__
        if isinstance(class_weights, Tensor):
            found = f"{class_weights.dtype} of shape {tuple(class_weights.shape)}"
        raise InputError(
            f"class_weights must be a floating-point tensor (C,), not {found}: use class_balanced_weights(counts)."
        )
    if can_read_values(class_weights) and not (valid := class_weights.isfinite() & (class_weights >= 0)).all():
        index = int((~valid).nonzero()[0])
        raise InputError(
            f"class_weights[{index}]={class_weights[index].item():.4g} must be a finite number of at least 0: use "
            "class_balanced_weights(counts)."
        )
    return class_weights.detach()


def check_batch(
    logits: Tensor,
    target: Tensor,
    noise: Tensor | None,
    class_counts: Tensor | None,
    class_weights: Tensor | None = None,
) -> None:
    """Check logits (B, C), labels (B,) from 0 to C - 1 or probabilities (B, C), and noise (B, C) or None.

    Counts and weights, if given, must have C entries. Values are checked where reading them costs nothing: on a CPU,
    outside torch.compile and torch.func.
    """
    if not isinstance(logits, Tensor):
        raise InputError(f"logits must be a tensor (B, C), not {type(logits).__name__}: pass output.logits.")
    if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[0] == 0:
        raise InputError(
            f"logits must be floating point (B, C) with B > 0, not {logits.dtype} of shape {tuple(logits.shape)}."
        )
    num_classes = logits.shape[1]
    for name, values in (("class_counts", class_counts), ("class_weights", class_weights)):
        if values is not None and len(values) != num_classes:
            raise InputError(
                f"logits have {num_classes} columns, but {name} has {len(values)} entries: pass one per column."
            )
    for name, tensor in (("target", target), ("noise", noise)):
        if not isinstance(tensor, Tensor) and (name == "target" or tensor is not None):
            raise InputError(f"{name} must be a tensor, not {_type(tensor)}: {_as_tensor(name, tensor)}.")
        if tensor is not None and tensor.device != logits.device:
            raise InputError(
                f"{name} is on {tensor.device}, but logits are on {logits.device}: pass {name}.to(logits.device)."
            )
    for values in (class_counts, class_weights):
        if values is not None and values.device != logits.device:
            raise InputError(
                f"The loss is on {values.device}, but logits are on {logits.device}: use criterion.to(logits.device)."
            )
    if noise is not None and noise.shape != logits.shape:
        raise InputError(f"noise must have the shape of logits, {tuple(logits.shape)}, not {tuple(noise.shape)}.")
    if noise is not None and noise.requires_grad:
        raise InputError("noise requires a gradient, but the loss has none with respect to it: pass noise.detach().")
    _check_target(target, logits.shape[0], num_classes)


def _type(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _as_tensor(name: str, value: object) -> str:
    """What to pass in place of a value that is not a tensor."""
    if value is None:
        return "the batch has no labels, so pass those of a labelled data set"
    if isinstance(value, Mapping):
        return f"pass the tensor of labels among its entries, {', '.join(map(str, value)):.100}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) and item.ndim for item in value):
        return (
            "pass a single tensor (B, C), for Mixup or CutMix of labels y1 and y2 "
            "weight * one_hot(y1, C) + (1 - weight) * one_hot(y2, C)"
        )
    return f"pass torch.as_tensor({name})"


def _check_target(target: Tensor, rows: int, num_classes: int) -> None:
    found = f"not {target.dtype} of shape {tuple(target.shape)}"
    rule = f"target must be class indices of shape ({rows},) or probabilities of shape ({rows}, {num_classes}), {found}"
    integers = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    if target.ndim == 2 and target.shape[1] == 1 < num_classes:
        raise InputError(f"{rule}: pass target.squeeze(1){'' if integers else '.long()'}.")
    if target.shape == (rows, num_classes):
        if not target.is_floating_point():
            raise InputError(f"{rule}: pass target.float() if it is one-hot.")
        _check_probabilities(target)
    elif target.ndim == 2 and target.shape[0] == rows:
        raise InputError(f"{rule}: create Mixup, CutMix or one_hot with num_classes={num_classes}.")
    elif target.shape != (rows,):
        raise InputError(f"{rule}: pass the labels of the same batch as the logits, a label for each row.")
    elif not integers:
        raise InputError(f"{rule}: pass target.long() if the values are class indices.")
    elif can_read_values(target):
        labels = target.long()
        out_of_range = (labels < 0) | (labels >= num_classes)
        if out_of_range.any():
            raise InputError(
                f"target contains the label {labels[out_of_range][0].item()}, but the classes are 0 to "
                f"{num_classes - 1}: drop rows with ignored labels, or give the head and the loss all classes."
            )


def _check_probabilities(target: Tensor) -> None:
    if can_read_values(target) and not (valid := is_distribution(target)).all():
        row = int((~valid).nonzero()[0])
        raise InputError(
            f"target[{row}] must be probabilities, but its smallest value is {target[row].min().item():.4g} and its "
            f"sum is {target[row].sum(dtype=torch.float64).item():.4g}: pass scores through softmax(dim=1), and divide "
            "multi-label targets by their number of labels."
        )


def counts_for_batch(
    logits: Tensor,
    target: Tensor,
    class_counts: Sequence[int] | Mapping[int, int] | Tensor,
    *,
    noise: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Check counts and a batch; return the counts `(C,)` on the device of the logits."""
    counts = checked_class_counts(class_counts)
    counts = counts.to(logits.device) if isinstance(logits, Tensor) else counts
    check_batch(logits, target, noise, counts, class_weights)
    return counts


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
        if not is_finite_number(value) or not _in_range(name, value):
            raise ConfigError(f"{name}={value!r} must be a finite number {_RULES.get(name, 'of at least 0')}.")


_RULES = {
    "scale": "greater than 0",
    "epochs": "greater than 0",
    "label_smoothing": "from 0 to 1",
    "beta": "of at least 0 and below 1",
}


def _in_range(name: str, value: float) -> bool:
    if name in ("scale", "epochs"):
        return value > 0
    return 0 <= value <= (1 if name == "label_smoothing" else math.inf) and not (name == "beta" and value >= 1)
