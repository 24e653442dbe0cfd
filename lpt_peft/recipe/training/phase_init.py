"""How a phase begins: what is open to learning, and where keys and group prompts start from.

Not here: the phase itself (`phase.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from lpt_peft._random import seeded
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.recipe.loading.batches import Seeded
from lpt_peft.recipe.loading.loader import image_loader, resolve_workers
from lpt_peft.recipe.parallel import copy_from_first, place, rows_of_all
from lpt_peft.recipe.settings import TrainSettings

_ENOUGH = 50_000  # queries for k-means


def begin_phase(
    adapter: LongTailPromptAdapter,
    name: str,
    dataset: Dataset[Any],
    settings: TrainSettings,
    *,
    accelerator: Accelerator,
    saved: Mapping[str, Tensor] | None = None,
) -> None:
    """Open what phase `name` learns.

    Args:
        adapter: On its device.
        name: "shared", "group" or "joint".
        dataset: Yields (image, label), for the k-means start of the keys.
        settings: `init_groups`, `init_keys`, `seed`.
        accelerator: Its mixed precision is that of the queries.
        saved: Tensors to go on from; None starts the pool as the settings say.
    """
    if saved is not None:
        adapter.load_adapter_state_dict(saved)
    elif name != "shared":
        if settings.init_groups == "shared":
            adapter.pool.init_prompts(adapter.shared.prompts[adapter.prompt_config.first_group_layer :])
        if settings.init_keys == "kmeans":
            adapter.phase = "shared"
            adapter.pool.init_keys(_queries(adapter, dataset, settings, accelerator), seed=settings.seed)
        copy_from_first(adapter.pool)
    adapter.phase = "shared" if name == "shared" else "group"
    if name == "joint":
        adapter.shared.requires_grad_(True)


@torch.no_grad()
def _queries(
    adapter: LongTailPromptAdapter, dataset: Dataset[Any], settings: TrainSettings, accelerator: Accelerator
) -> Tensor:
    """Queries (N, d) of all images, at most 50,000 of them, evenly spread: enough for k-means; float32 or wider."""
    size = len(dataset)  # type: ignore[arg-type]
    some = list(range(0, size, -(-size // _ENOUGH)))
    rank, processes = place()
    mine = some[rank::processes]
    mine += mine[-1:] * (-(-len(some) // processes) - len(mine))  # as many on every process
    device, mode = adapter.head.weight.device, adapter.training
    batch_size = 2 * settings.batch_size
    loader = image_loader(
        Seeded(dataset, (settings.seed, "queries")),
        batch_size=batch_size,
        sampler=[(index, index) for index in mine],  # rows; the place is the image's own
        num_workers=resolve_workers(settings.num_workers, dataset, batch_size),
        pin_memory=device.type == "cuda",
    )
    adapter.eval()
    with seeded(settings.seed, device), accelerator.autocast():
        queries = torch.cat([adapter.features(images.to(device, non_blocking=True)) for images, _ in loader])
    adapter.train(mode)
    return rows_of_all(queries.to(torch.promote_types(queries.dtype, torch.float32)), len(some))
