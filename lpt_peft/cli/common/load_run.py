"""A finished run as loaded from its folder: adapter, class names and settings."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.cli.common.build_adapter import build_run_backbone
from lpt_peft.cli.common.paths import SETTINGS, existing_prompt_folder
from lpt_peft.cli.common.run_settings import ImageSettings, RunSettings, read_settings
from lpt_peft.recipe.settings import TrainSettings


class LoadedRun(NamedTuple):
    """A trained adapter and the settings of its run."""

    adapter: LongTailPromptAdapter
    class_names: list[str]
    images: ImageSettings
    shot_rule: str
    training: TrainSettings
    """Settings of the run; the defaults for a prompt file alone."""
    data: str | None
    """DATA of the run; None for a prompt file alone."""


def load_run(folder: Path) -> LoadedRun:
    """Load the adapter of an output folder, or of a prompt file, on its backbone; on the accelerator if there is any.

    Raises:
        StateError: The run has not written its prompts yet.
        LPTError: The settings, the backbone or the prompt file are not usable.
    """
    run, data = None, None
    prompts = existing_prompt_folder(folder)
    folder = folder.parent if folder.is_file() else folder
    if (folder / SETTINGS).exists():
        values = read_settings(folder / SETTINGS)
        data = values.pop("data", None)
        run = RunSettings.from_dict(values)
    if run is None:
        adapter = LongTailPromptAdapter.from_pretrained(prompts)
    else:
        adapter = LongTailPromptAdapter.from_pretrained(prompts, build_run_backbone(run))
        if run.training.backbone_dtype != "float32":
            adapter.cast_backbone(getattr(torch, run.training.backbone_dtype))
    adapter.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    names = adapter.metadata.label_names or [str(label) for label in range(adapter.prompt_config.num_classes)]
    return LoadedRun(
        adapter=adapter.eval(),
        class_names=list(names),
        images=ImageSettings.from_preprocess(adapter.metadata.preprocess) if run is None else run.images,
        shot_rule="lpt" if run is None else run.shot_rule,
        training=TrainSettings() if run is None else run.training,
        data=data,
    )
