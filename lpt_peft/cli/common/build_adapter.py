"""The backbone of a run, and the model that is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lpt_peft._prompt_content import mark_loaded, replace_prompts
from lpt_peft._random import seeded
from lpt_peft._run_folder import MODEL_METHODS, prompt_folder
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.cli.common.backbone_names import check_backbone_name
from lpt_peft.cli.common.flags import GROUP_SIZES
from lpt_peft.cli.common.messages import notice
from lpt_peft.cli.common.run_settings import RunSettings
from lpt_peft.errors import ConfigError
from lpt_peft.hub import read_prompts
from lpt_peft.inference.run_backbone import RunBackbone
from lpt_peft.vit_classifier import ViTClassifier

if TYPE_CHECKING:  # predict works without accelerate
    from lpt_peft.recipe.methods import Model


def build_run_backbone(run: RunSettings) -> nn.Module:
    """Build the ViT of a run, in eval mode; random weights are the same for the same seed.

    Raises:
        BackboneError: No installed library has such a model, or its weights are not available.
        ConfigError: The model does not take these settings.
        MissingExtraError: Its library is not installed.
    """
    check_backbone_name(run.backbone)
    return RunBackbone(
        backbone=run.backbone,
        pretrained=run.pretrained,
        img_size=run.img_size,
        backbone_weights=None if run.backbone_weights is None else str(run.backbone_weights),
        seed=run.training.seed,
    ).build()


def build_model(run: RunSettings, class_names: Sequence[str]) -> Model:
    """Build the model of the run's method; its initial prompts and head are the same for the same seed.

    Raises:
        ConfigError: The method does not take a setting.
        LPTError: As `build_adapter`.
    """
    method = run.training.method
    if method not in MODEL_METHODS:
        return build_adapter(run, class_names)
    if run.start_from is not None:
        raise ConfigError(f"--start-from copies prompts, which method {method} does not have: leave it out.")
    vit = build_run_backbone(run)
    prompts = run.prompts
    with seeded(run.training.seed):
        return ViTClassifier.wrap(
            vit, len(class_names), method=method, head_dropout=prompts.head_dropout, logit_scale=prompts.logit_scale
        )


def build_adapter(run: RunSettings, class_names: Sequence[str]) -> LongTailPromptAdapter:
    """Wrap the backbone with new prompts, the same for the same seed, or with those that the run starts from.

    Raises:
        LPTError: The backbone, the sizes or the prompt file are not usable.
    """
    sizes = asdict(run.prompts)
    if run.training.method == "vpt_shallow":
        sizes = {name: size for name, size in sizes.items() if name not in GROUP_SIZES} | {"placement": "shallow"}
    vit = build_run_backbone(run)
    with seeded(run.training.seed):
        adapter = LongTailPromptAdapter.wrap(vit, len(class_names), **sizes)
    if run.start_from is not None:
        _start_from(run.start_from, adapter, class_names)
    return adapter


def _start_from(source: str, adapter: LongTailPromptAdapter, class_names: Sequence[str]) -> None:
    folder = Path(source)
    prompts = read_prompts(str(prompt_folder(folder)) if folder.is_dir() else source)
    named = prompts.metadata.label_names is not None
    changes = replace_prompts(adapter, prompts, part="shared", label_names=class_names if named else None)
    mark_loaded(adapter, prompts, source, "shared")
    text = "The file does not name its classes, so all rows of the head are new." if changes is None else str(changes)
    notice(f"{source}: {text}")
