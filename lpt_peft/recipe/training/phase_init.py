"""Initializes a phase: trainable parameters, and the start of prompts, keys, groups and head.

Not here: the phase itself (`phase.py`), and the passes over images that the starts need (`image_passes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from lpt_peft._random import derive_seed
from lpt_peft._text import number
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.prompts import PromptPool
from lpt_peft.recipe.parallel import broadcast_module
from lpt_peft.recipe.progress import Reporter
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.recipe.training.image_passes import ImagePasses, query_indices
from lpt_peft.starts import nearest_images

TRAINED_PARTS: Mapping[str, tuple[str, ...]] = {"shared": ("shared",), "group": ("pool",), "joint": ("shared", "pool")}
"""Parts of an adapter that a phase trains, besides the head."""


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
        adapter: On its device, the same on all processes, which must all call this.
        name: "shared", "group" or "joint".
        dataset: Yields (image, label); the starts that need training images read them.
        settings: `init_prompts`, `init_head`, `init_groups`, `init_keys` and `seed` are used. Parts that
            `kept_parts` names are not initialized.
        accelerator: Provides the mixed precision of the passes over images.
        reporter: Receives a warning if k-means is not possible, and the classes without a class mean.
        saved: Tensors of a checkpoint to resume from; None initializes the parameters as the settings specify.
    """
    if adapter.router is not None:
        adapter.router = None
        reporter.note("The router was removed, since training changes the queries that it predicts: fit it again")
    passes = ImagePasses(dataset, settings, accelerator, reporter)
    if saved is not None:
        adapter.load_adapter_state_dict(saved)
    else:
        kept = kept_parts(adapter.trained_parts, settings) if name == next(iter(settings.plan), name) else {}
        if name != "group" and "shared" not in kept and settings.init_prompts == "tokens":
            _init_prompts(adapter, passes, settings.seed)
            broadcast_module(adapter.shared)
        if name != "shared" and "pool" not in kept:
            _init_pool(adapter, passes, settings, reporter)
            broadcast_module(adapter.pool)
    adapter.phase = "shared" if name == "shared" else "group"
    if saved is None and name == next(iter(settings.plan), name) and settings.init_head == "class_mean":
        init_head(adapter, passes, reporter)
    if name == "joint":
        adapter.shared.requires_grad_(True)


def kept_parts(trained_parts: Mapping[str, str], settings: TrainSettings) -> dict[str, str]:
    """Select the parts that the first phase of a run trains and does not initialize; see `adapter.trained_parts`.

    Groups are initialized again after a phase "shared" of the same run, which changes the queries of their keys.

    Args:
        trained_parts: Origins of the parts that were loaded or trained before.
        settings: Phases of the run.
    """
    first = TRAINED_PARTS[next(iter(settings.plan))] if settings.plan else ()
    return {part: origin for part, origin in trained_parts.items() if part in first}


def init_head(model: nn.Module, passes: ImagePasses, reporter: Reporter) -> None:
    """Set the class vectors of a model to normalized class means of its features, without global random state.

    Args:
        model: Has a `CosineClassifier` named `head`, and `features(images)` returns its inputs (B, d).
        passes: The training images.
        reporter: Receives the classes whose vector did not change.
    """
    head: Any = model.get_submodule("head")
    kept = head.init_class_means(passes.class_sums(model))
    if kept:
        listed = ", ".join(map(str, kept[:10])) + (", ..." if len(kept) > 10 else "")
        reporter.warn(
            f"{len(kept)} of {number(len(head.weight), 'class')} have no training image and keep their class vectors "
            f"instead of class means: {listed}"
        )
    broadcast_module(head)


def _init_prompts(adapter: LongTailPromptAdapter, passes: ImagePasses, seed: int) -> None:
    """Set the shared prompt to tokens of `n` random training images; with fewer images, they repeat."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "token images"))
    order = torch.randperm(passes.size, generator=generator).tolist()
    length = adapter.prompt_config.prompt_length
    chosen = (order * -(-length // len(order)))[:length]
    with passes.batches(chosen, "prompts") as batches:
        adapter.init_prompts(batches, seed=derive_seed(seed, "prompts"))


def _init_pool(
    adapter: LongTailPromptAdapter, passes: ImagePasses, settings: TrainSettings, reporter: Reporter
) -> None:
    """Set keys and group prompts; one pass over the images gives the queries that both need."""
    pool, config = adapter.pool, adapter.prompt_config
    if settings.init_groups == "shared":
        pool.init_prompts(adapter.shared.prompts[config.first_group_layer :])
    if settings.init_keys == "random" and settings.init_groups != "tokens":
        return
    queries = passes.queries(adapter)
    if settings.init_keys == "kmeans":
        _init_keys(pool, queries, settings.seed, reporter)
    if settings.init_groups == "tokens":
        indices = torch.tensor(query_indices(passes.size), device=queries.device)
        nearest = indices[nearest_images(queries, pool.keys, config.prompt_length).flatten()].tolist()
        # The same purpose: the crops are those of the queries.
        with passes.batches(nearest, "queries") as batches:
            seed = derive_seed(settings.seed, "groups")
            tokens = adapter.sample_tokens(batches, len(nearest), seed=seed)[config.first_group_layer :]
        pool.init_prompts(tokens.unflatten(1, (config.pool_size, config.prompt_length)).transpose(0, 1))


def trained_parameters(model: nn.Module, settings: TrainSettings) -> int:
    """Count the parameters that the phases of a run train, including the head.

    Args:
        model: An adapter; or any module, whose parameters that require a gradient are trained.
        settings: Phases of the run.
    """
    if not isinstance(model, LongTailPromptAdapter):
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    modules: set[nn.Module] = {model.head}
    modules |= {model.get_submodule(part) for phase in settings.plan for part in TRAINED_PARTS[phase]}
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
