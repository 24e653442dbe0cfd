"""A finished run as loaded from its folder: model, class names and settings."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lpt_peft._run_folder import SETTINGS
from lpt_peft.cli.common.run_settings import ImageSettings, RunSettings, read_settings
from lpt_peft.errors import ConfigError
from lpt_peft.inference.source import load_model
from lpt_peft.recipe.settings import TrainSettings

if TYPE_CHECKING:
    from lpt_peft.inference.source import Model


class LoadedRun(NamedTuple):
    """A trained model and the settings of its run."""

    model: Model
    class_names: list[str]
    images: ImageSettings
    shot_rule: str
    training: TrainSettings
    """Settings of the run; the defaults for a prompt file or model file alone."""
    data: str | None
    """DATA of the run; None for a prompt file or model file alone."""


def load_run(folder: Path) -> LoadedRun:
    """Load the model of an output folder, or of a prompt file or model file; on the accelerator if there is any.

    Raises:
        StateError: The run has not written its result yet.
        LPTError: The settings, the backbone or the file are not usable.
    """
    run, data = None, None
    settings = (folder.parent if folder.is_file() else folder) / SETTINGS
    if settings.exists():
        values = read_settings(settings)
        data = values.pop("data", None)
        run = RunSettings.from_dict(values)
    model = load_model(folder)
    names = model.metadata.label_names or [str(label) for label in range(model.num_classes)]
    return LoadedRun(
        model=model,
        class_names=list(names),
        images=ImageSettings.from_preprocess(model.metadata.preprocess) if run is None else run.images,
        shot_rule="lpt" if run is None else run.shot_rule,
        training=TrainSettings() if run is None else run.training,
        data=data,
    )


def class_counts_of(run: LoadedRun, folder: Path) -> tuple[int, ...]:
    """Return the training images of each class.

    Raises:
        ConfigError: The file of the model does not have them.
    """
    if (counts := run.model.metadata.class_counts) is None:
        raise ConfigError(
            f"The file in {folder} has no class counts, which decide the many-, medium- and few-shot classes. "
            "Save it with class_counts."
        )
    return counts


def available_precision(training: TrainSettings) -> TrainSettings:
    """The run's settings, in a precision that this machine supports."""
    if training.mixed_precision != "fp16" or torch.accelerator.is_available():
        return training
    warnings.warn(
        "The run was measured in fp16, which needs a GPU. Here the model computes in float32, so the figures may "
        "differ from the run's in the last digits.",
        stacklevel=2,
    )
    return replace(training, mixed_precision="no")
