"""Several processes as one: the same model everywhere, and one gradient, that of the whole batch.

What is learnt is a few megabytes, so the gradient travels as one vector, and frozen parts never do. That is all that
`DistributedDataParallel` would do here; but its buckets change after the first step, and with them the last bits of a
sum over three processes or more, so a run could not go on exactly after a break. Not here: sharded models.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from lpt_peft.errors import ConfigError

_REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def check_accelerator(accelerator: Accelerator) -> None:
    """The loop can run on it.

    Raises:
        ConfigError: It shards models, or accumulates gradients by itself.
    """
    if accelerator.distributed_type not in _REPLICATED:
        raise ConfigError(
            f"The recipe keeps a whole model on every process; Accelerate is set to "
            f"{accelerator.distributed_type.value}. For sharded models take examples/with_accelerate.py."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"Accelerate is set to gradient_accumulation_steps={accelerator.gradient_accumulation_steps}, which would "
            "shrink every step; leave it at 1 and give TrainSettings(accumulate=...)."
        )


@torch.no_grad()
def copy_from_first(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first one; nothing where there is one process."""
    if several():
        for tensor in chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor.data, 0)


@torch.no_grad()
def mean_gradients(parameters: Iterable[nn.Parameter], numbers: Iterable[Tensor]) -> Tensor:
    """Replace gradients by their mean over all processes, and tell that of a few numbers besides.

    Args:
        parameters: Those without a gradient are left alone; the same ones have one on every process.
        numbers: Scalars.

    Returns:
        One vector: the means of the gradients, then those of the numbers.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([tensor.flatten() for tensor in (*gradients, *numbers)])
    if several():
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        place = 0
        for gradient in gradients:
            gradient.copy_(flat[place : place + gradient.numel()].view_as(gradient))
            place += gradient.numel()
    return flat


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes; the tensor itself stays."""
    total = tensor.clone()
    if several():
        dist.all_reduce(total)
    return total


def several() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def place() -> tuple[int, int]:
    """Rank and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if several() else (0, 1)


def rows_of_all(rows: Tensor, size: int) -> Tensor:
    """Rows that were dealt out like cards, row i to process i % R, together again: (size, ...).

    Args:
        rows: This process's, (ceil(size / R), ...); what is too many is a filler.
        size: How many there are in all.
    """
    if not several():
        return rows[:size]
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)[:size]
