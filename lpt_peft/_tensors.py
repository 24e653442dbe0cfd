"""Reading and writing tensors that are sharded (FSDP2), parametrized, pruned or quantized.

`torch.distributed.tensor` is not imported here, because it takes longer to import than this package: a DTensor can
exist only if other code has imported it.
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
    """Whether the tensor is sharded by FSDP2 or tensor parallelism."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gather_full(tensor: Any) -> Tensor:
    """Return the full tensor; a sharded tensor is gathered, which all processes must call together."""
    full: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
    return full


def plain_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Iterate over the tensors in the values of a state dict; a quantized tensor gives the plain tensors inside it.

    torch.ao packs weight and bias into a tuple, and torchao's tensors are subclasses that hold several tensors.
    Sharded tensors are returned unchanged, other values (dtypes, numbers) are skipped.
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
    """Return the current value of a module's tensor, also if it is parametrized or pruned.

    `torch.nn.utils.prune` updates the attribute in a forward hook, so it is out of date after an optimizer step.
    """
    if (pruned := _pruned(module, name)) is not None:
        original, mask = pruned
        return original * mask
    value: Tensor = getattr(module, name)
    return value


def refusal(module: nn.Module, name: str, value: Tensor) -> str | None:
    """Return why `write_value` cannot set the tensor to this value, with the remedy; None if it can."""
    if parametrize.is_parametrized(module, name):
        remedy = f'Call torch.nn.utils.parametrize.remove_parametrizations(module, "{name}") first.'
        trial: Any = copy.deepcopy(module.parametrizations[name])  # type: ignore[index]
        try:
            trial.right_inverse(value.to(getattr(module, name)))
        except (NotImplementedError, RuntimeError):  # depends on the parametrization
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
    """Set a module's tensor to a value: a full tensor, the same on every process, or a DTensor.

    A parametrized tensor is set through `right_inverse`, a pruned tensor below its mask.

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
        # Every process has all values and keeps its shard: nothing is sent.
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def _pruned(module: nn.Module, name: str) -> tuple[Tensor, Tensor] | None:
    """The unmasked tensor and the mask of `torch.nn.utils.prune`; None if it is not pruned."""
    original, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
    return None if original is None or mask is None else (original, mask)
