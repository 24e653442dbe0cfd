"""Several processes as one: the same model everywhere, and one gradient, that of the whole batch.

What is learnt is a few megabytes, so the gradient travels as one vector, and frozen parts never do. That is all that
`DistributedDataParallel` would do here; but its buckets change after the first step, and with them the last bits of a
sum over three processes or more, so a run could not go on exactly after a break. Not here: sharded models.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from lpt_peft.errors import ConfigError
from lpt_peft.recipe.settings import TrainSettings

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


def check_precision(settings: TrainSettings, accelerator: Accelerator) -> None:
    """Check that the backbone's dtype can be trained through.

    Raises:
        ConfigError: Gradients would pass through float16 without a scaled loss, where small ones vanish; or weights
            and autocast have different 16-bit dtypes, which torch does not mix.
    """
    dtype, precision = settings.backbone_dtype, accelerator.mixed_precision
    if dtype == "float16" and precision != "fp16":
        raise ConfigError(
            f'backbone_dtype="float16" needs mixed_precision="fp16", which scales the loss, not "{precision}": small '
            'gradients would vanish on their way through float16. Or take backbone_dtype="bfloat16".'
        )
    if dtype == "bfloat16" and precision == "fp16":
        raise ConfigError(
            'backbone_dtype="bfloat16" and mixed_precision="fp16" are two 16-bit dtypes, which torch does not mix: '
            'take mixed_precision="bf16" or "no", or backbone_dtype="float16".'
        )


@torch.no_grad()
def copy_from_first(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first one; nothing where there is one process."""
    if several():
        for tensor in chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor.data, 0)


@torch.no_grad()
def mean_gradients(gradients: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    """Replace gradients, in place, by their mean over all processes, in one all-reduce with a few numbers.

    Only where there are several processes.

    Args:
        gradients: The same ones on every process, (...,) each.
        numbers: Scalars, at least one.

    Returns:
        The means of the numbers, (len(numbers),).
    """
    flat = torch.cat([tensor.flatten() for tensor in (*gradients, *numbers)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = flat.split([*(gradient.numel() for gradient in gradients), len(numbers)])
    for gradient, mean in zip(gradients, means, strict=False):  # numbers come last
        gradient.copy_(mean.view_as(gradient))
    last: Tensor = means[-1]
    return last


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
