"""Initializes a phase: trainable parameters, keys and group prompts.

Not here: the phase itself (`phase.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from lpt_peft._random import seeded
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.prompts import PromptPool
from lpt_peft.recipe.loading.batches import SeededDataset
from lpt_peft.recipe.loading.loader import image_loader, open_batches, resolve_workers
from lpt_peft.recipe.parallel import broadcast_module, gather_strided
from lpt_peft.recipe.progress import Reporter
from lpt_peft.recipe.settings import TrainSettings

MAX_QUERIES = 50_000  # for k-means


def begin_phase(
    adapter: LongTailPromptAdapter,
    name: str,
    dataset: Dataset[Any],
    settings: TrainSettings,
    *,
    accelerator: Accelerator,
    reporter: Reporter,
    saved: Mapping[str, Tensor] | None = None,
) -> None:
    """Initialize phase `name` and enable gradients of its parameters.

    Args:
        adapter: On its device.
        name: "shared", "group" or "joint".
        dataset: Yields (image, label); its queries initialize the keys by k-means.
        settings: `init_groups`, `init_keys` and `seed` are used.
        accelerator: Provides the mixed precision of the queries.
        reporter: Receives a warning if k-means is not possible.
        saved: Tensors of a checkpoint to resume from; None initializes the pool as the settings specify.
    """
    if saved is not None:
        adapter.load_adapter_state_dict(saved)
    elif name != "shared":
        if settings.init_groups == "shared":
            adapter.pool.init_prompts(adapter.shared.prompts[adapter.prompt_config.first_group_layer :])
        if settings.init_keys == "kmeans":
            adapter.phase = "shared"
            _init_keys(adapter.pool, _queries(adapter, dataset, settings, accelerator), settings.seed, reporter)
        broadcast_module(adapter.pool)
    adapter.phase = "shared" if name == "shared" else "group"
    if name == "joint":
        adapter.shared.requires_grad_(True)


def trained_parameters(model: nn.Module, settings: TrainSettings) -> int:
    """Count the parameters that the phases of a run train, including the head.

    Args:
        model: An adapter; or any module, whose parameters that require a gradient are trained.
        settings: Phases of the run.
    """
    if not isinstance(model, LongTailPromptAdapter):
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    modules: set[nn.Module] = {model.head}
    modules |= {model.shared} if {"shared", "joint"} & settings.plan.keys() else set()
    modules |= {model.pool} if {"group", "joint"} & settings.plan.keys() else set()
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _init_keys(pool: PromptPool, queries: Tensor, seed: int, reporter: Reporter) -> None:
    """Initialize keys by k-means, unless there are too few distinct queries; the training so far must not be lost."""
    distinct = len(queries.unique(dim=0))
    if distinct < len(pool.keys):
        reporter.warn(
            f"The training images give {distinct} distinct queries for {len(pool.keys)} groups, too few for k-means: "
            "the keys start at random. Use a smaller pool_size."
        )
    else:
        pool.init_keys(queries, seed=seed)


@torch.no_grad()
def _queries(
    adapter: LongTailPromptAdapter, dataset: Dataset[Any], settings: TrainSettings, accelerator: Accelerator
) -> Tensor:
    """Queries (N, d) of evenly spaced images, at most 50,000; float32 or wider."""
    size = len(dataset)  # type: ignore[arg-type]
    indices = list(range(0, size, -(-size // MAX_QUERIES)))
    rank, processes = accelerator.process_index, accelerator.num_processes
    share = indices[rank::processes]
    share += share[-1:] * (-(-len(indices) // processes) - len(share))  # equally many on every process
    device, training = adapter.head.weight.device, adapter.training
    loader = image_loader(
        SeededDataset(dataset, (settings.seed, "queries")),
        batch_size=settings.batch_size,
        sampler=[(index, index) for index in share],  # rows whose position is the image's index
        num_workers=resolve_workers(settings.num_workers, dataset, settings.batch_size),
        pin_memory=device.type == "cuda",
    )
    adapter.eval()
    with seeded(settings.seed, device), accelerator.autocast(), open_batches(loader) as batches:
        queries = torch.cat([adapter.features(images.to(device, non_blocking=True)) for images, _ in batches])
    adapter.train(training)
    queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
    return gather_strided(accelerator, queries, len(indices))
