"""DataLoaders of the recipe, over readable images.

Not here: the start and the shutdown of worker processes (`lpt_peft.data.workers`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lpt_peft._random import preserve_random_state
from lpt_peft.data.workers import choose_workers, worker_options
from lpt_peft.recipe.checks import collate
from lpt_peft.recipe.loading.readable import first_readable


def resolve_workers(num_workers: int | None, dataset: Dataset[Any], batch_size: int) -> int:
    """Number of worker processes for a loader in this process.

    Args:
        num_workers: Returned unchanged; None chooses, see `lpt_peft.data.workers.choose_workers`.
        dataset: Map-style, yields (image, label).
        batch_size: Images of a batch.

    Raises:
        InputError: The first item is not an image tensor.
    """
    if num_workers is not None:
        return num_workers

    def batch_bytes() -> int:
        with preserve_random_state():
            image, _ = collate([first_readable(dataset)[1]])
        return batch_size * image.nbytes

    return choose_workers(len(dataset), batch_bytes)  # type: ignore[arg-type]


def collate_readable(items: list[Any]) -> tuple[Tensor, Tensor] | None:
    """Collate the items that are not None; None if there are none. See `lpt_peft.recipe.checks.collate`."""
    readable = [item for item in items if item is not None]
    return collate(readable) if readable else None


def image_loader(
    dataset: Dataset[Any], *, num_workers: int, pin_memory: bool = False, persistent: bool = False, **sampling: Any
) -> DataLoader[Any]:
    """Build a loader of (images, labels) batches; see `collate_readable` and `lpt_peft.data.workers.worker_options`.

    Args:
        dataset: Map-style.
        num_workers: Worker processes; 0 loads in this process.
        pin_memory: Load into pinned memory, for asynchronous copies to an accelerator.
        persistent: Keep the workers from one pass to the next.
        **sampling: `batch_size` and `sampler`, or `batch_sampler`.
    """
    return DataLoader(
        dataset,
        collate_fn=collate_readable,
        pin_memory=pin_memory,
        persistent_workers=persistent and num_workers > 0,
        **worker_options(num_workers),
        **sampling,
    )
