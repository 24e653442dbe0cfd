"""A pass over images that computes everything an analysis needs of a model: predictions, features, variants.

Not here: statistics of these tensors (`sections.py`, `lpt_peft.analysis`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.analysis import add_noise, blur
from lpt_peft.errors import InputError
from lpt_peft.metrics.accumulator import predict_labels
from lpt_peft.recipe.evaluate import evaluation_batches, evaluation_loader
from lpt_peft.recipe.loading.readable import without_replacements
from lpt_peft.recipe.progress import Reporter

_BATCH = 128
Variant = Callable[[Tensor], dict[str, Tensor]]
"""Function of a batch of images that returns logits (B, C) by name."""


class Measured(NamedTuple):
    """Results for N images, on the CPU."""

    target: Tensor
    """(N,) int64."""
    prediction: Tensor
    """(N,) int64."""
    probability: Tensor
    """(N,) float32: softmax probability of the predicted class."""
    groups: Tensor
    """(N, k) int64: selected groups; k is 0 without groups."""
    features: dict[str, Tensor]
    """(N, d) float32 by state."""
    variants: dict[str, Tensor]
    """(N,) int64: predicted classes by variant."""
    calibrated: Tensor | None = None
    """(N,) float32: `probability` with the temperature, if it is given."""
    losses: Tensor | None = None
    """(N, 2) float32: negative log-likelihood in nats, without and with the temperature, if it is given."""


def states_of(model: Any) -> list[str]:
    """States of a model whose features can be computed, from the plain ViT to the trained model."""
    if isinstance(model, LongTailPromptAdapter):
        return ["plain", "shared", "group"] if model.phase == "group" else ["plain", "shared"]
    return ["tuned"] if model.method == "full" else ["plain"]


def measure(
    model: Any,
    dataset: Dataset[Any],
    name: str,
    *,
    accelerator: Accelerator,
    reporter: Reporter,
    num_workers: int | None = None,
    features: bool = False,
    temperature: float | None = None,
    variants: Sequence[Variant] = (),
) -> Measured:
    """Run a model on images; unreadable images are left out.

    Args:
        model: An adapter or a classifier without prompts, on its device.
        dataset: Yields (image, label).
        name: Of the pass, for the progress and messages.
        accelerator: Provides mixed precision.
        reporter: Shows the progress.
        num_workers: Processes that load images; None chooses.
        features: Compute features in all states.
        temperature: Of `calibrated` and `losses`; the labels must then be classes of the model.
        variants: Further predictions.

    Raises:
        InputError: No image can be read.
    """
    loader = evaluation_loader(model, without_replacements(dataset), _BATCH, num_workers)
    columns: dict[str, list[Tensor]] = {}
    with evaluation_batches(model, loader, accelerator) as batches:
        for images, target in reporter.track(batches, name, len(loader)):
            row = _row(model, images, target, states_of(model) if features else [], temperature=temperature)
            for variant in variants:
                row |= {f"variants.{key}": logits.argmax(1) for key, logits in variant(images).items()}
            for column, values in row.items():
                columns.setdefault(column, []).append(values.cpu())
    if not columns:
        raise InputError(f"{name}: none of the images can be read. Repair them, or check the paths.")
    joined = {column: torch.cat(parts) for column, parts in columns.items()}

    def named(kind: str) -> dict[str, Tensor]:
        return {column.partition(".")[2]: values for column, values in joined.items() if column.startswith(kind)}

    return Measured(
        target=joined["target"],
        prediction=joined["prediction"],
        probability=joined["probability"],
        groups=joined["groups"],
        features=named("features."),
        variants=named("variants."),
        calibrated=joined.get("calibrated"),
        losses=joined.get("losses"),
    )


def _row(
    model: Any, images: Tensor, target: Tensor, states: Sequence[str], *, temperature: float | None
) -> dict[str, Tensor]:
    """Columns of a batch, (B, ...)."""
    output = model(images, return_output=True)
    logits = output.logits.float()
    prediction, probability = predict_labels(logits, logits.shape[1])
    row = {
        "target": target,
        "prediction": prediction,
        "probability": probability,
        "groups": output.groups,
    }
    if temperature is not None:
        scaled, classes = logits / temperature, target.to(logits.device)
        row["calibrated"] = predict_labels(scaled, logits.shape[1])[1]
        row["losses"] = torch.stack([F.cross_entropy(z, classes, reduction="none") for z in (logits, scaled)], 1)
    row |= {f"features.{state}": _features(model, state, images, output).float() for state in states}
    return row


def _features(model: Any, state: str, images: Tensor, output: Any) -> Tensor:
    adapter = isinstance(model, LongTailPromptAdapter)
    if state == "plain" and adapter:
        return plain_features(model, images)
    if state == "shared" and model.phase == "group":
        final = model.prompt_config.query == "final"  # the query is then the feature under the shared prompt
        features: Tensor = output.query if final else model.mixture_features([None], images)[0]
        return features
    found: Tensor = output.features
    return found


def plain_features(model: Any, images: Tensor) -> Tensor:
    """Features (B, d) of the ViT without prompts."""
    args, kwargs = model.frozen_weights.cast_inputs(((images,), {}))
    features: Tensor = model.backbone.plain_feature(*args, **kwargs)
    return features


def pool_variants(adapter: LongTailPromptAdapter, seed: int = 0) -> Variant:
    """Predictions with other groups than the selected: "random", "averaged", "none" and "group 0", "group 1", ..."""
    size, chosen = adapter.prompt_config.pool_size, adapter.prompt_config.top_k
    generator = torch.Generator().manual_seed(seed)

    def variant(images: Tensor) -> dict[str, Tensor]:
        picked = torch.rand(len(images), size, generator=generator).topk(chosen, dim=1).indices
        random = torch.zeros(len(images), size).scatter_(1, picked, 1 / chosen)
        mixtures = [random, torch.full((size,), 1 / size), None, *torch.eye(size)]
        names = ["random", "averaged", "none", *(f"group {group}" for group in range(size))]
        moved = [None if weights is None else weights.to(images.device) for weights in mixtures]
        features = adapter.mixture_features(moved, images)
        return {name: adapter.head(rows) for name, rows in zip(names, features, strict=True)}

    return variant


def shift_variants(model: Any, strengths: dict[str, tuple[str, float]], seed: int = 0) -> Variant:
    """Predictions on images with noise or blur.

    Args:
        model: Its `preprocess()` has the mean and std of the images.
        strengths: Kind ("noise" or "blur") and strength, by name of the variant: the standard deviation of the noise
            for values from 0 to 1, or of the blur in pixels.
        seed: Of the noise.
    """
    preprocess = model.preprocess()
    generator = torch.Generator().manual_seed(seed)

    def variant(images: Tensor) -> dict[str, Tensor]:
        mean, std = (images.new_tensor(preprocess[name]).view(-1, 1, 1) for name in ("mean", "std"))
        pixels = images * std + mean
        found = {}
        for name, (kind, strength) in strengths.items():
            changed = add_noise(pixels, strength, generator) if kind == "noise" else blur(pixels, strength)
            found[name] = model((changed - mean) / std)
        return found

    return variant
