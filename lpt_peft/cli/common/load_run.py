"""What a finished run left: settings, adapter and class names, for the commands that use it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.cli.common.build_run import build_backbone
from lpt_peft.cli.common.run_settings import SETTINGS, ImageSettings, RunSettings, read_settings
from lpt_peft.errors import StateError
from lpt_peft.recipe.experiment import PROMPTS
from lpt_peft.recipe.settings import TrainSettings


class Trained(NamedTuple):
    """A trained adapter and how it came about."""

    adapter: LongTailPromptAdapter
    class_names: list[str]
    images: ImageSettings
    shot_rule: str
    training: TrainSettings
    """Settings of the run; the defaults for a prompt file alone."""
    data: str | None


def open_trained(folder: Path) -> Trained:
    """The adapter of an output folder on its backbone, or of a prompt file, which names it; on the GPU, if any.

    Raises:
        StateError: The run has written no prompts yet.
        LPTError: Whatever is wrong with settings, backbone or prompt file.
    """
    run, data = None, None
    if (folder / SETTINGS).exists():
        values = read_settings(folder / SETTINGS)
        data = values.pop("data", None)
        run = RunSettings.from_dict(values)
        if not (folder / PROMPTS).is_dir():
            raise StateError(f"{folder} holds no prompts yet: the run was broken off. Its own command goes on with it.")
    if run is None:
        adapter = LongTailPromptAdapter.from_pretrained(folder)
    else:
        adapter = LongTailPromptAdapter.from_pretrained(folder / PROMPTS, build_backbone(run))
        if run.training.backbone_dtype != "float32":
            adapter.cast_backbone(getattr(torch, run.training.backbone_dtype))
    adapter.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    names = adapter.metadata.label_names or [str(label) for label in range(adapter.prompt_config.num_classes)]
    return Trained(
        adapter=adapter.eval(),
        class_names=list(names),
        images=ImageSettings() if run is None else run.images,
        shot_rule="lpt" if run is None else run.shot_rule,
        training=TrainSettings() if run is None else run.training,
        data=data,
    )
