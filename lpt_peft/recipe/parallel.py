"""Data-parallel training: an identical model on every process, and the mean gradient of the whole batch.

The communication itself is Accelerate's. `DistributedDataParallel` is not used: it regroups its buckets after the first
step, which changes the last bits of sums over three or more processes, so an interrupted run could not resume exactly.
The trained parameters take a few megabytes, so their gradients travel as one vector, and frozen parameters never do.
Sharded models are not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, broadcast_object_list, gather_object
from torch import Tensor, nn

from lpt_peft.errors import ConfigError, LPTError
from lpt_peft.recipe.settings import TrainSettings

T = TypeVar("T")
_REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def check_accelerator(accelerator: Accelerator) -> None:
    """Check that the training loop supports this accelerator.

    Raises:
        ConfigError: It shards models, or accumulates gradients itself.
    """
    if accelerator.distributed_type not in _REPLICATED:
        raise ConfigError(
            f"The recipe keeps a complete model on every process, but Accelerate is set to "
            f"{accelerator.distributed_type.value}. For sharded models see examples/with_accelerate.py."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"Accelerate is set to gradient_accumulation_steps={accelerator.gradient_accumulation_steps}, which would "
            "shrink every step; leave it at 1 and pass TrainSettings(accumulate=...)."
        )


def check_precision(settings: TrainSettings, accelerator: Accelerator) -> None:
    """Check that the loop supports the mixed precision, and that gradients can pass through the backbone in its dtype.

    Raises:
        ConfigError: Accelerator and settings differ, or the precision is not supported; gradients would pass through
            float16 without a scaled loss, where small values vanish; weights and autocast have different 16-bit
            dtypes, which torch does not mix.
    """
    dtype, precision = settings.backbone_dtype, accelerator.mixed_precision
    if settings.mixed_precision not in (None, precision):
        raise ConfigError(
            f'The accelerator has mixed_precision="{precision}" but the settings "{settings.mixed_precision}": give it '
            "to one of them, or the same to both."
        )
    if precision not in ("no", "bf16", "fp16"):
        raise ConfigError(f'mixed_precision="{precision}" of Accelerate is not supported: use "no", "bf16" or "fp16".')
    if precision == "fp16" and accelerator.scaler is None:
        raise ConfigError(
            f'mixed_precision="fp16" scales the loss only on a GPU; on {accelerator.device} small gradients would '
            'vanish. Use "bf16" or "no".'
        )
    if dtype == "float16" and precision != "fp16":
        raise ConfigError(
            f'backbone_dtype="float16" needs mixed_precision="fp16", which scales the loss, not "{precision}": small '
            'gradients would vanish on their way through float16. Or use backbone_dtype="bfloat16".'
        )
    if dtype == "bfloat16" and precision == "fp16":
        raise ConfigError(
            'backbone_dtype="bfloat16" and mixed_precision="fp16" are different 16-bit dtypes, which torch does not '
            'mix: use mixed_precision="bf16" or "no", or backbone_dtype="float16".'
        )


def on_main_process(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call a function on the main process; return its result, or raise its `LPTError`, on all processes.

    Without this, an error such as a full disk would leave the other processes waiting.

    Args:
        accelerator: Its processes must all call this.
        function: Its result is pickled if there are several processes.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = function()
        except LPTError as error:
            answer[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


def gather_numbers(accelerator: Accelerator, numbers: list[int]) -> list[int]:
    """Join the lists of all processes, which must all call this."""
    joined: list[int] = gather_object(numbers) if accelerator.num_processes > 1 else numbers
    return joined


@torch.no_grad()
def broadcast_module(module: nn.Module) -> None:
    """Copy the first process's parameters and buffers to all processes, in place."""
    for tensor in chain(module.parameters(), module.buffers()):
        broadcast(tensor.data)


@torch.no_grad()
def average_gradients(accelerator: Accelerator, gradients: Sequence[Tensor], scalars: Sequence[Tensor]) -> Tensor:
    """Replace gradients, in place, by their mean over all processes, in a single all-reduce together with scalars.

    Args:
        accelerator: Its processes must all call this.
        gradients: Tensors of any shapes, the same shapes on every process.
        scalars: Zero-dimensional tensors, at least one.

    Returns:
        The means of the scalars, (len(scalars),).
    """
    flat = torch.cat([tensor.flatten() for tensor in (*gradients, *scalars)])
    flat = accelerator.reduce(flat, "mean")
    means = flat.split([*(gradient.numel() for gradient in gradients), len(scalars)])
    for gradient, mean in zip(gradients, means, strict=False):  # the scalars come last
        gradient.copy_(mean.view_as(gradient))
    last: Tensor = means[-1]
    return last


@torch.no_grad()
def gather_strided(accelerator: Accelerator, rows: Tensor, size: int) -> Tensor:
    """Undo strided sharding, where row i was on process i % R.

    Accelerate's `gather_for_metrics` expects contiguous shards of a prepared loader; the order would differ.

    Args:
        accelerator: Its processes must all call this.
        rows: This process's rows, (ceil(size / R), ...), padded at the end.
        size: Number of rows without padding.

    Returns:
        All rows in order, (size, ...).
    """
    shards: Tensor = accelerator.gather(rows)  # (R * ceil(size / R), ...)
    ordered: Tensor = shards.unflatten(0, (accelerator.num_processes, -1)).transpose(0, 1).flatten(0, 1)[:size]
    return ordered
