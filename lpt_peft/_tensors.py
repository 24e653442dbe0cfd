"""Tensors of modules that are sharded (FSDP2), parametrized or pruned: read their values, write them.

Nothing here imports `torch.distributed.tensor`, which takes longer to import than this whole package: a tensor can be
a DTensor only where somebody else has imported it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def is_dtensor(tensor: Tensor) -> bool:
    """Whether FSDP2 or tensor parallelism has sharded the tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gather_full(tensor: Any) -> Tensor:
    """The tensor itself, or gathered from all processes where it is sharded; then all processes must call this."""
    full: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
    return full


def plain_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in the values of a state dict, quantized ones as the plain tensors that they are made of.

    torch.ao packs weight and bias into a tuple, and torchao's tensors are subclasses that hold several. A sharded
    tensor stays whole. What is no tensor (a dtype, a number) is left out.
    """
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from plain_tensors(value)
        elif not isinstance(value, Tensor):
            continue
        elif hasattr(value, "__tensor_flatten__") and not is_dtensor(value):
            names, _ = value.__tensor_flatten__()
            yield from plain_tensors(getattr(value, name) for name in names)
        elif value.is_quantized and value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            yield from (value.int_repr(), value.q_per_channel_scales(), value.q_per_channel_zero_points())
        elif value.is_quantized:
            yield from (value.int_repr(), torch.tensor([value.q_scale(), value.q_zero_point()], dtype=torch.float64))
        else:
            yield value


def read_value(module: nn.Module, name: str) -> Tensor:
    """The present value of a module's tensor, also where it is computed: parametrized, or pruned.

    `torch.nn.utils.prune` computes the attribute in a forward hook, so after an optimizer step it is out of date.
    """
    if (pruned := _pruned(module, name)) is not None:
        original, mask = pruned
        return original * mask
    value: Tensor = getattr(module, name)
    return value


def refusal(module: nn.Module, name: str, value: Tensor) -> str | None:
    """Why `write_value` cannot give the tensor this value, with the remedy; None where it can."""
    if parametrize.is_parametrized(module, name):
        remedy = f'Call torch.nn.utils.parametrize.remove_parametrizations(module, "{name}") first.'
        trial: Any = copy.deepcopy(module.parametrizations[name])  # type: ignore[index]
        try:
            trial.right_inverse(value.to(getattr(module, name)))
        except (NotImplementedError, RuntimeError):  # torch raises the one or the other
            return f"its parametrization has no right_inverse for them. {remedy}"
        if not torch.allclose(trial(), value.to(trial()), rtol=1e-4, atol=1e-6):
            return f"its parametrization cannot take these values. {remedy}"
    elif (pruned := _pruned(module, name)) is not None:
        kept = pruned[1].to(value) != 0
        if not bool((value.masked_fill(kept, 0) == 0).all()):
            return f'the values are not 0 where it is pruned. Call torch.nn.utils.prune.remove(module, "{name}") first.'
    return None


@torch.no_grad()
def write_value(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module's tensor a value: a full tensor, the same on every process, or a DTensor.

    A parametrized tensor takes it through `right_inverse`, a pruned one in the tensor that the mask is laid over.

    Args:
        module: The module that holds the tensor.
        name: Its name there, without a dot.
        value: Same shape, any floating point dtype, any device.
    """
    if parametrize.is_parametrized(module, name):
        setattr(module, name, value.to(getattr(module, name)))
        return
    pruned = _pruned(module, name)
    target: Any = getattr(module, name) if pruned is None else pruned[0]
    if is_dtensor(target) and not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - loaded already: target is a DTensor

        value = value.to(target.device, target.dtype)
        # Every process has the values and takes its own part of them: nothing is sent.
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def _pruned(module: nn.Module, name: str) -> tuple[Tensor, Tensor] | None:
    """The tensor under a mask of `torch.nn.utils.prune`, and the mask."""
    original, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
    return None if original is None or mask is None else (original, mask)
