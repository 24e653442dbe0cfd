"""`lpt-peft evaluate DIR [DATA]`: the numbers of a finished run, measured anew from its saved files."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from lpt_peft.cli.common.extras import extra_needed
from lpt_peft.cli.common.options import Json
from lpt_peft.errors import ConfigError

if TYPE_CHECKING:
    from lpt_peft.recipe.settings import TrainSettings


def evaluate(
    folder: tyro.conf.Positional[Path], data: tyro.conf.Positional[str | None] = None, /, as_json: Json = False
) -> None:
    """Measure a trained model on the validation and test parts of its data, or on other images.

    Args:
        folder: Output folder of `lpt-peft train`, or a prompt file.
        data: Images, as for `lpt-peft train`; a folder of class folders or a list is taken as a test part.
        as_json: Print one JSON object instead of the table.
    """
    with extra_needed("lpt-peft evaluate", "train"):
        from lpt_peft.cli.common.load_run import open_trained
        from lpt_peft.cli.common.open_data import open_parts, open_test_parts, set_transforms
        from lpt_peft.cli.common.tables import print_results
        from lpt_peft.metrics import ShotMetrics, ShotResult
        from lpt_peft.recipe.evaluate import evaluate as measure
        from lpt_peft.recipe.train import make_accelerator

    trained = open_trained(folder)
    adapter = trained.adapter
    counts = adapter.metadata.class_counts
    if counts is None:
        raise ConfigError(f"The prompt file in {folder} tells no class counts, so nothing says what many and few are.")
    if data is None and trained.data is None:
        raise ConfigError(
            f"{folder} does not tell what it was trained on; name the images: lpt-peft evaluate DIR DATA."
        )
    if data is None:
        parts = open_parts(str(trained.data), trained.images, trained.training.seed)
        parts.pop("train")
    else:
        parts = open_test_parts(data, trained.images, trained.training.seed, trained.class_names)
    set_transforms(parts, adapter.backbone.preprocess(), trained.images)
    metrics = ShotMetrics.from_rule(trained.shot_rule, counts)
    accelerator = make_accelerator(_settings_here(trained.training))
    results: dict[str, ShotResult] = {
        name: measure(adapter, parts[name], metrics, num_workers=trained.training.num_workers, accelerator=accelerator)
        for name in ("validation", "test")
        if name in parts
    }
    print_results(results, as_json=as_json)


def _settings_here(training: TrainSettings) -> TrainSettings:
    """The run's settings, in a precision that this machine has."""
    import torch

    if training.mixed_precision != "fp16" or torch.accelerator.is_available():
        return training
    warnings.warn(
        "The run was measured in fp16, which needs a GPU. Without one the model answers in float32, and figures may "
        "differ from the run's own in the last digits.",
        stacklevel=2,
    )
    return replace(training, mixed_precision="no")
