"""A finished run as loaded from its folder: model, class names and settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.cli.common.build_adapter import build_run_backbone
from lpt_peft.cli.common.paths import SETTINGS, existing_prompt_folder, model_folder
from lpt_peft.cli.common.run_settings import ImageSettings, RunSettings, read_settings
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.vit_classifier import ViTClassifier

if TYPE_CHECKING:  # predict works without accelerate
    from lpt_peft.recipe.methods import Model


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
    source = model_folder(folder)
    kind: type[Model] = LongTailPromptAdapter if source is None else ViTClassifier
    source = source or existing_prompt_folder(folder)
    folder = folder.parent if folder.is_file() else folder
    if (folder / SETTINGS).exists():
        values = read_settings(folder / SETTINGS)
        data = values.pop("data", None)
        run = RunSettings.from_dict(values)
    if run is None:
        model = kind.from_pretrained(source)
    else:
        model = kind.from_pretrained(source, build_run_backbone(run))
        if run.training.backbone_dtype != "float32":
            model.cast_backbone(getattr(torch, run.training.backbone_dtype))
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    names = model.metadata.label_names or [str(label) for label in range(model.num_classes)]
    return LoadedRun(
        model=model.eval(),
        class_names=list(names),
        images=ImageSettings.from_preprocess(model.metadata.preprocess) if run is None else run.images,
        shot_rule="lpt" if run is None else run.shot_rule,
        training=TrainSettings() if run is None else run.training,
        data=data,
    )
