"""analyse: measure a trained model in a few passes over its images.

Not here: opening runs and images (`lpt_peft.cli.analyse`), statistics (`sections.py`), pictures
(`lpt_peft.analysis.plots`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from lpt_peft._numbers import checked_integer
from lpt_peft._text import number
from lpt_peft._version import __version__
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.analysis import ClassMatch, accuracy_shift, fit_temperature
from lpt_peft.data.images import LabelledImages
from lpt_peft.errors import InputError
from lpt_peft.metrics.result import counts_by_class
from lpt_peft.metrics.shot_rules import SHOT_RULES
from lpt_peft.recipe.analyse import sections
from lpt_peft.recipe.analyse.probe import Measured, measure, pool_variants, shift_variants
from lpt_peft.recipe.analyse.subsets import matched_images, stratified_indices
from lpt_peft.recipe.evaluate import predict
from lpt_peft.recipe.loading.readable import without_replacements
from lpt_peft.recipe.progress import Reporter
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.recipe.train import make_accelerator

_NOISE = 0.1
_BLUR = 1 / 64  # of the width of an image
_MOST_LOGITS = 2**26


@dataclass(frozen=True)
class AnalysedImages:
    """Images of an analysis, all with the transform of an evaluation and with labels."""

    evaluation: LabelledImages
    """The images that the model is measured on."""
    split: str
    """"test" or "validation"."""
    source: str
    """Where they come from."""
    train: LabelledImages | None = None
    """Training images, for neighbours and discriminants."""
    validation: LabelledImages | None = None
    """For the temperature, if the model's file has none."""
    shifts: Mapping[str, tuple[str, LabelledImages]] = field(default_factory=dict)
    """Shifted test sets by name: where they come from, and the images, with their own classes."""
    pretraining: tuple[str, LabelledImages] | None = None
    """Images like those of the pretraining; their labels do not matter."""


def analyse(
    model: Any,
    images: AnalysedImages,
    *,
    class_names: Sequence[str],
    class_counts: Sequence[int],
    shot_rule: str = "lpt",
    settings: TrainSettings | None = None,
    accelerator: Accelerator | None = None,
    max_images: int = 10_000,
    max_variant_images: int = 2_000,
    progress: bool = True,
) -> dict[str, Any]:
    r"""Measure what a model learned and where it fails.

    Predictions are computed for all images. Features are computed for at most `max_images` training and `max_images`
    evaluated images, and predictions with other groups, noise and blur for at most `max_variant_images`; these subsets
    keep the images of rare classes.

    Args:
        model: An adapter or a classifier without prompts, on its device, in eval mode.
        images: What to measure it on.
        class_names: Names (C,) in label order.
        class_counts: Training images of each class (C,).
        shot_rule: A name of `lpt_peft.metrics.SHOT_RULES`.
        settings: Of the run: method, number of workers and precision; None uses the defaults.
        accelerator: Provides mixed precision; None makes one of the settings.
        max_images: Most images whose features are computed, of each split.
        max_variant_images: Most images that are measured with other groups, noise and blur.
        progress: Show progress on standard error.

    Returns:
        Strict JSON. Accuracies are fractions from 0 to 1, a mean over nothing is None, lists of classes are in label
        order. What does not apply is missing, and `left_out` gives the reason by section:

        - `format_version` (1), `lpt_peft` (version), `seconds`
        - `model`: method, phase, classes, groups (None without), top_k
        - `data`: source, split, images, shot_rule, and the sizes of the subsets: feature_images, train_images (None
          without), variant_images
        - `left_out`: reasons by section
        - `classes`: lists name, train_images, shots ("many", "medium", "few"), images, correct, accuracy,
          confused_with (the class that images are most confused with, or None), confused_images
        - `accuracy`: overall, many, medium, few as (estimate, low, high) or None; level and draws of the bootstrap
        - `weak`: never_right, and worst (the share `share` of classes) with worst_accuracy
        - `confused_pairs`: at most 50 of target, prediction, images, share; most images first
        - `features`: for each state ("plain", "shared", "group" or "tuned", as they exist) knn_1 and knn_20 with
          accuracy and balanced_accuracy, and the cosine distances intra, inter and their ratio gamma
        - `projection`: classes, and for each state points [x, y], label, shrinkage and ratio of the discriminants
        - `pretraining`: source, images, and for each state first (pretraining) and second (test) points, separation
          (1 apart, 0.5 aligned) and shrinkage
        - `matching`: histogram (C x m), usage, unused, group_entropy, class_entropy, mutual_information, chance (bits)
        - `pool`: rows chosen, random, averaged, none, fixed, oracle with accuracy and balanced_accuracy;
          chosen_minus the others, as intervals of the balanced accuracy; fixed_group, oracle_groups
        - `calibration`: temperature (source "file" or "validation", value, and the mean negative log-likelihood of the
          evaluated images, loss_before and loss_after; or None), and before and after (None without) for
          overall, many, medium, few: error, and images, accuracy and confidence of 15 bins
        - `shift`: a list of name, kind ("noise", "blur" or "folder"), strength, source, classes, images, original,
          shifted, lost, kept, and unmatched and missing class names

    Raises:
        InputError: No image can be read, or a shifted test set has none of the classes.
        ConfigError: A number is out of range.
    """
    start = time.perf_counter()
    max_images = checked_integer("max_images", max_images, 1)
    max_variant_images = checked_integer("max_variant_images", max_variant_images, 1)
    settings = settings or TrainSettings()
    reporter = Reporter(progress, True)
    run = _Passes(model, accelerator or make_accelerator(settings), reporter, settings.num_workers)
    groups = model.prompt_config.pool_size if isinstance(model, LongTailPromptAdapter) else 0
    has_groups = bool(groups) and model.phase == "group"
    size = len(class_names)
    left_out: dict[str, str] = {}
    # Before the passes, since classes that do not match are an error.
    matched = {name: matched_images(shifted, class_names) for name, (_, shifted) in images.shifts.items()}
    named = {"train": images.train, "evaluation": images.evaluation, "validation": images.validation}
    with reporter.unreadable_images(**{name: split for name, split in named.items() if split is not None}):
        temperature = run.temperature(images, left_out)
        value = None if temperature is None else temperature[0]
        everything, test = run.evaluation(images.evaluation, max_images, value)
        train = None if images.train is None else run.features(images.train, "training images", max_images)
        strengths = _strengths(model)
        variants = [shift_variants(model, strengths)] + ([pool_variants(model)] if has_groups else [])
        subset = _subset(images.evaluation, max_variant_images)
        varied = run.measure(subset, "groups, noise and blur" if has_groups else "noise and blur", variants=variants)
        shifts = [_synthetic(name, *strengths[name], varied, size) for name in strengths]
        shifts += [
            {"name": name, "kind": "folder", "strength": None, "source": images.shifts[name][0]}
            | run.shift(name, kept, match, everything, class_names)
            for name, (kept, match) in matched.items()
        ]
        found: dict[str, Any] = {
            **sections.prediction_sections(everything, class_names, class_counts, shot_rule, temperature),
            "features": sections.features_section(test, train, size),
            "shift": shifts,
        }
        if train is None:
            left_out["knn"] = left_out["projection"] = "no training images are available"
        elif isinstance(plane := sections.projection_section(test, train, class_counts), str):
            left_out["projection"] = plane
        else:
            found["projection"] = plane
        if images.pretraining is not None:
            source, pretraining = images.pretraining
            first = run.features(pretraining, "pretraining images", max_images)
            found["pretraining"] = sections.pretraining_section(first, test, source)
        if has_groups:
            found["matching"] = sections.matching_section(everything, size, groups)
            found["pool"] = sections.pool_section(varied, class_counts, groups)
        else:
            left_out["matching"] = left_out["pool"] = "the model selects no groups"
    if "tuned" in test.features:
        left_out["plain"] = "the weights of the plain ViT were changed by the training"
    return {
        "format_version": 1,
        "lpt_peft": __version__,
        "seconds": round(time.perf_counter() - start, 1),
        "model": {
            "method": settings.method,
            "phase": getattr(model, "phase", None),
            "classes": size,
            "groups": groups if has_groups else None,
            "top_k": model.prompt_config.top_k if has_groups else None,
        },
        "data": {
            "source": images.source,
            "split": images.split,
            "images": len(everything.target),
            "shot_rule": str(SHOT_RULES[shot_rule]),
            "feature_images": len(test.target),
            "train_images": None if train is None else len(train.target),
            "variant_images": len(varied.target),
        },
        "left_out": left_out,
        **found,
    }


class _Passes:
    """Passes of a model over images."""

    def __init__(self, model: Any, accelerator: Accelerator, reporter: Reporter, num_workers: int | None) -> None:
        self._model, self._accelerator, self._num_workers = model, accelerator, num_workers
        self._reporter = reporter

    def measure(self, images: LabelledImages, name: str, **options: Any) -> Measured:
        self._reporter.note(f"{name}: {number(len(images), 'image')}")
        return measure(
            self._model,
            images,
            name,
            accelerator=self._accelerator,
            reporter=self._reporter,
            num_workers=self._num_workers,
            **options,
        )

    def features(self, images: LabelledImages, name: str, most: int) -> Measured:
        return self.measure(_subset(images, most), name, features=True)

    def evaluation(self, images: LabelledImages, most: int, temperature: float | None) -> tuple[Measured, Measured]:
        """Predictions on all images, and features of at most `most` of them."""
        if len(images) <= most:
            found = self.measure(images, "evaluated images", features=True, temperature=temperature)
            return found, found
        everything = self.measure(images, "evaluated images", temperature=temperature)
        return everything, self.features(images, "features", most)

    def temperature(self, images: AnalysedImages, left_out: dict[str, str]) -> tuple[float, str] | None:
        """Temperature of the model's "file", or fitted on the "validation" images; None, and why, if there is none."""
        if images.split == "validation":
            left_out["temperature"] = "it is fitted on the validation images, which are the evaluated images here"
            return None
        stored: float | None = self._model.metadata.temperature
        if stored is not None:
            return stored, "file"
        if images.validation is None:
            left_out["temperature"] = "the model's file has none, and there is no validation split to fit it on"
            return None
        subset = _subset(images.validation, max(1, _MOST_LOGITS // len(images.validation.class_names)))
        self._reporter.note(f"validation images: {number(len(subset), 'image')}")
        output, target = predict(
            self._model,
            without_replacements(subset),
            num_workers=self._num_workers,
            accelerator=self._accelerator,
        )
        try:
            return fit_temperature(output.logits, target).value, "validation"
        except InputError as error:
            left_out["temperature"] = str(error)
            return None

    def shift(
        self, name: str, images: LabelledImages, match: ClassMatch, original: Measured, class_names: Sequence[str]
    ) -> dict[str, Any]:
        """Accuracy on images of a shifted test set, over the classes that the original images have as well."""
        shifted = self.measure(images, f"shift {name}")
        indices = torch.tensor([-1 if index is None else index for index in match.indices])
        counts = counts_by_class(indices[shifted.target], shifted.prediction, len(class_names))
        before = counts_by_class(original.target, original.prediction, len(class_names))
        shift = sections.plain(accuracy_shift(*before, *counts))
        return {**shift, "unmatched": list(match.unmatched), "missing": list(match.missing)}


def _synthetic(name: str, kind: str, strength: float, varied: Measured, size: int) -> dict[str, Any]:
    before = counts_by_class(varied.target, varied.prediction, size)
    after = counts_by_class(varied.target, varied.variants[name], size)
    shift = sections.plain(accuracy_shift(*before, *after))
    own = {"name": name, "kind": kind, "strength": strength, "source": None}
    return {**own, **shift, "unmatched": [], "missing": []}


def _strengths(model: Any) -> dict[str, tuple[str, float]]:
    """Noise and blur, in proportion to the size of the images."""
    return {"noise": ("noise", _NOISE), "blur": ("blur", round(_BLUR * model.preprocess()["input_size"][-1], 2))}


def _subset(images: LabelledImages, most: int) -> LabelledImages:
    indices = stratified_indices(images.labels, most)
    return images if len(indices) == len(images) else images.subset(indices, allow_empty=True)
