"""Moving averages of what is learnt, and a place to put other values in for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Values = dict[str, Tensor]


def values_of(parameters: Mapping[str, Tensor]) -> Values:
    """Copies of the parameters' values."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def put(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Give the parameters these values."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@torch.no_grad()
def move_average(
    average: Values, parameters: Mapping[str, nn.Parameter], decay: float, step: int, found_inf: Tensor
) -> None:
    """`average <- d * average + (1 - d) * value`, in place, with `d = min(decay, (1 + step) / (10 + step))`.

    The start is not remembered for longer than the steps done warrant, as in timm's and TensorFlow's averages.

    Args:
        average: Moving averages by name.
        parameters: Parameters by name.
        decay: Largest `d`.
        step: Steps done before this one.
        found_inf: Scalar float32 on the parameters' device: 1 leaves the averages as they are, 0 moves them.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    good = 1 - found_inf
    for name, parameter in parameters.items():
        average[name].lerp_(parameter, good.to(parameter.dtype) * weight)


@contextmanager
def instead(values: Mapping[str, Tensor] | None, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters have these values; None leaves them."""
    if values is None:
        yield
        return
    own = values_of(parameters)
    put(values, parameters)
    try:
        yield
    finally:
        put(own, parameters)
