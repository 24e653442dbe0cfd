"""Summary of a run, printed before its first step: data, phases, device, and everything chosen automatically."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from lpt_peft._run_folder import MODEL_METHODS
from lpt_peft._text import number
from lpt_peft.recipe.loading.batches import steps_per_epoch
from lpt_peft.recipe.loading.loader import resolve_workers
from lpt_peft.recipe.method_settings import settings_without_effect, unused_settings
from lpt_peft.recipe.rates import learning_rates, rate_scale
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from lpt_peft.recipe.training.image_passes import MAX_QUERIES
from lpt_peft.recipe.training.phase_init import kept_parts
from lpt_peft.recipe.training.schedule import warmup_steps


def run_summary(
    dataset: Dataset[Any],
    labels: Sequence[int],
    settings: TrainSettings,
    accelerator: Accelerator,
    *,
    num_classes: int,
    query: str = "final",
    trained_parts: Mapping[str, str] | None = None,
    validation: Dataset[Any] | None = None,
    criterion: Any = None,
) -> str:
    """Describe a run in a few lines.

    Args:
        dataset: Training images; a `LabelledImages` describes itself, including files that were left out.
        labels: Class of every training image.
        settings: Training settings.
        accelerator: Device, precision, processes.
        num_classes: Of the head.
        query: How groups are selected, see `PromptConfig.query`.
        trained_parts: Parts of the model that were loaded or trained before, see `LongTailPromptAdapter`.
        validation: Validation images.
        criterion: The caller's criterion, if any.
    """
    summary = getattr(dataset, "summary", None)
    lines = [f"Training: {_describe(labels, num_classes) if summary is None else summary}"]
    if validation is not None:
        lines.append(f"Validation: {describe_split(validation, num_classes)}")
    steps = steps_per_epoch(len(labels), settings)
    phases = ", ".join(f"{name} {number(phase.epochs, 'epoch')}" for name, phase in settings.plan.items()) or "none"
    total = steps * sum(phase.epochs for phase in settings.plan.values())
    lines.append(
        f"Phases: {phases}; {number(steps, 'step')} per epoch, {number(total, 'step')} of {settings.batch_size} images "
        f"({_sampling(settings)})"
    )
    kept = kept_parts(trained_parts or {}, settings)
    if settings.plan:
        scale = rate_scale(settings)
        rates = "; ".join(f"{name} {_rates(phase, name, settings)}" for name, phase in settings.plan.items())
        lines.append(
            f"Learning rates: {rates}; {_OPTIMIZERS[settings.optimizer]}"
            + (f", times {scale:g} for {settings.half_batch} images in each half" if scale != 1 else "")
        )
        lines.append(f"Starts: {_starts(settings, kept)}")
    if set(settings.plan) - {"shared"}:
        passes = "a second pass" if query == "final" else "a single pass"
        lines.append(f"Groups: selected by query {query}, in {passes}")
    lines.append(_device(dataset, settings, accelerator))
    return "\n".join([*lines, *(f"note: {note}" for note in _notes(labels, settings, steps, kept, criterion))])


def _describe(labels: Sequence[int], num_classes: int) -> str:
    counts = np.bincount(labels, minlength=num_classes)
    present = np.flatnonzero(counts)
    largest, smallest = counts.argmax(), present[counts[present].argmin()]
    empty = num_classes - len(present)
    return (
        f"{number(len(labels), 'image')} of {number(num_classes, 'class')}; largest class {largest} "
        f"({counts[largest]}), smallest class {smallest} ({counts[smallest]})"
        + (f"; {number(empty, 'class')} without an image" if empty else "")
    )


def describe_split(split: Dataset[Any], num_classes: int) -> str:
    """Describe a validation or test split; a `LabelledImages` describes itself.

    Args:
        split: Images of the split.
        num_classes: Of the head.
    """
    summary = getattr(split, "summary", None)
    text = str(summary or number(len(split), "image"))  # type: ignore[arg-type]
    labels = getattr(split, "labels", None)
    if labels is None or not (missing := num_classes - len(np.unique(labels))):
        return text
    return (
        f"{text}\nnote: {missing} of {number(num_classes, 'class')} have no image here and do not affect its accuracy"
    )


def _sampling(settings: TrainSettings) -> str:
    if settings.sampling == "dual":
        return f"{settings.half_batch} instance-balanced, {settings.half_batch} class-balanced"
    return "instance-balanced"


_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}


def _rates(phase: PhaseSettings, name: str, settings: TrainSettings) -> str:
    """The learning rates of a phase, before the scaling with the batch."""
    rates = learning_rates(phase, settings)
    parts = [f"{rates.base:g}"]
    if rates.head != rates.base:
        parts.append(f"head {rates.head:g}")
    if name != "shared" and rates.pool != rates.base:
        parts.append(f"groups {rates.pool:g}")
    return ", ".join(parts)


def _starts(settings: TrainSettings, kept: Mapping[str, str]) -> str:
    """The initial values of everything that is trained."""
    starts = {
        "head": {"random": "as given", "class_mean": "class means of the features"}[settings.init_head],
        "shared prompt": {"random": "as given", "tokens": "tokens of training images"}[settings.init_prompts],
        "keys": {"kmeans": "k-means centers of the queries", "random": "as given"}[settings.init_keys],
        "groups": {
            "shared": "copies of the shared prompt",
            "random": "as given",
            "tokens": "tokens of the images nearest to their keys",
        }[settings.init_groups],
    }
    if "shared" in kept:
        starts["shared prompt"] = kept["shared"]
    if "pool" in kept:
        starts["keys"] = starts["groups"] = kept["pool"]
    if set(settings.plan) == {"group"} or settings.method in MODEL_METHODS:
        del starts["shared prompt"]
    if set(settings.plan) == {"shared"}:
        del starts["keys"], starts["groups"]
    return "; ".join(f"{name} {start}" for name, start in starts.items())


def _device(dataset: Dataset[Any], settings: TrainSettings, accelerator: Accelerator) -> str:
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    precision = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast with a scaled loss"}
    share = settings.batch_size // accelerator.num_processes
    workers = resolve_workers(settings.num_workers, dataset, share)
    backbone = "" if settings.backbone_dtype == "float32" else f", backbone cast to {settings.backbone_dtype}"
    each = " each" if accelerator.num_processes > 1 else ""
    chosen = " (automatic)" if settings.num_workers is None else ""
    return (
        f"Device: {name}, {precision.get(str(accelerator.mixed_precision), accelerator.mixed_precision)}{backbone}; "
        f"{number(accelerator.num_processes, 'process')}, {number(workers, 'loading worker')}{each}{chosen}"
    )


_FREQUENCY_LOSSES = ("logit_adjusted", "balanced_softmax", "class_balanced")


def _notes(
    labels: Sequence[int], settings: TrainSettings, steps: int, kept: Mapping[str, str], criterion: Any
) -> Iterator[str]:
    """Everything that the settings do not do literally."""
    if settings.half_batch > len(labels):
        yield (
            f"half a batch ({settings.half_batch}) is larger than the training set ({number(len(labels), 'image')}), "
            "so images repeat within a step; a smaller batch_size gives more steps"
        )
    for name, phase in settings.plan.items():
        if phase.warmup and not warmup_steps(phase, phase.epochs * steps):
            yield f"phase {name} has no warm-up: {100 * phase.warmup:g} % of its steps is less than a step"
    if unused := list(unused_settings(settings)):
        yield f"method {settings.method} trains with the settings of shared and does not use {', '.join(unused)}"
    for reason, names in settings_without_effect(settings):
        if names:
            yield f"{names}: no effect, because {reason}"
    if criterion is not None:
        yield f'the given criterion replaces loss="{settings.loss}"'
    elif settings.sampling == "dual" and (settings.loss in _FREQUENCY_LOSSES or settings.reweight_from is not None):
        yield (
            "the loss corrects for the class frequencies of dual batches, half of which are class-balanced, not for "
            "those of the training images"
        )
    start = settings.reweight_from
    if criterion is None and start is not None:
        for name in (name for name, phase in settings.plan.items() if phase.epochs <= start):
            yield f"phase {name} ends before epoch {start}, from which class weights apply"
    if "pool" in kept:
        return
    queries = settings.init_keys == "kmeans" or settings.init_groups == "tokens"
    if queries and len(labels) > MAX_QUERIES and set(settings.plan) - {"shared"}:
        yield f"keys and groups start from the queries of at most {MAX_QUERIES} evenly spaced images"
