"""Moving averages of parameters, and temporary replacement of their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Values = dict[str, Tensor]


def clone_values(parameters: Mapping[str, Tensor]) -> Values:
    """Clone the parameters' values."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def copy_values_(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Overwrite the parameters with these values, in place."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@torch.no_grad()
def update_average(
    average: Values, parameters: Mapping[str, nn.Parameter], decay: float, step: int, found_inf: Tensor
) -> None:
    """Update `average <- d * average + (1 - d) * value`, in place, with `d = min(decay, (1 + step) / (10 + step))`.

    The smaller `d` of early steps limits the influence of the initial values, as in timm and TensorFlow.

    Args:
        average: Moving averages by name.
        parameters: Parameters by name.
        decay: Largest `d`.
        step: Number of earlier steps.
        found_inf: Scalar float32 on the parameters' device: 1 leaves the averages unchanged, 0 updates them.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    update = 1 - found_inf
    for name, parameter in parameters.items():
        average[name].lerp_(parameter, update.to(parameter.dtype) * weight)


@contextmanager
def temporarily_set(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Temporarily replace parameter values; None is a no-op."""
    if values is None:
        yield
        return
    original = clone_values(parameters)
    copy_values_(parameters, values)
    try:
        yield
    finally:
        copy_values_(parameters, original)
