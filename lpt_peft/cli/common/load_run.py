"""A finished run as loaded from its folder: model, class names and settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lpt_peft.cli.common.run_settings import ImageSettings, RunSettings, read_settings
from lpt_peft.inference.run_folder import SETTINGS
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
