"""The backbone and the adapter of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import timm
import torch
from torch import nn

from lpt_peft._prompt_content import replace_prompts
from lpt_peft._random import seeded
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.cli.common.messages import notice
from lpt_peft.cli.common.run_settings import RunSettings
from lpt_peft.errors import BackboneError, ConfigError
from lpt_peft.hub import read_prompts
from lpt_peft.recipe.training.head_init import copy_head_rows

BUNDLED = "glyph_vit"


def build_backbone(run: RunSettings) -> nn.Module:
    """Build the ViT of a run, in eval mode; random weights are the same for the same seed.

    Raises:
        BackboneError: timm has no such model, or its weights are not available.
        ConfigError: The settings ask for the bundled backbone with other weights or of another size.
    """
    if run.backbone == BUNDLED:
        if run.img_size is not None or run.backbone_weights is not None or not run.pretrained:
            raise ConfigError(
                f"{BUNDLED} comes with its weights and is for 32 px: leave out --img-size, --backbone-weights and "
                "--no-pretrained, or choose another backbone."
            )
        from lpt_peft.backbones.bundled.glyph_vit import glyph_vit

        bundled: nn.Module = glyph_vit()
        return bundled
    name = run.backbone.partition(".")[0]
    if name not in timm.list_models():
        near = timm.list_models(f"*{name}*")[:5] or timm.list_models("vit_base*")[:5]
        raise BackboneError(f'timm {timm.__version__} has no model "{name}". Similar names: {", ".join(near)}.')
    options: dict[str, Any] = {} if run.img_size is None else {"img_size": run.img_size}
    if run.backbone_weights is not None:
        options["pretrained_cfg_overlay"] = {"file": str(run.backbone_weights)}
    pretrained = run.pretrained or run.backbone_weights is not None
    try:
        with seeded(run.training.seed):
            vit: nn.Module = timm.create_model(run.backbone, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:  # of the network, the Hub, timm or a damaged file
        if not pretrained:
            raise BackboneError(f"timm cannot build {run.backbone}: {error}") from error
        raise BackboneError(
            f"The weights of {run.backbone} are not available: {type(error).__name__}: {str(error)[:300]}. Without a "
            "network give a file, --backbone-weights FILE; for random weights, --no-pretrained."
        ) from error
    return vit.eval()


def build_adapter(run: RunSettings, class_names: Sequence[str]) -> LongTailPromptAdapter:
    """Wrap the backbone with new prompts, the same for the same seed, or with those that the run starts from.

    Raises:
        LPTError: The backbone, the sizes or the prompt file are not usable.
    """
    vit = build_backbone(run)
    with seeded(run.training.seed):
        adapter = LongTailPromptAdapter.wrap(vit, len(class_names), **asdict(run.prompts))
    if run.start_from is not None:
        _start_from(run.start_from, adapter, class_names)
    return adapter


@torch.no_grad()
def _start_from(source: str, adapter: LongTailPromptAdapter, class_names: Sequence[str]) -> None:
    prompts = read_prompts(source)
    replace_prompts(adapter, prompts, part="shared")
    head = prompts.tensors["head.weight"]
    notice(f"{source}: {copy_head_rows(adapter.head, class_names, head, prompts.metadata.label_names)}.")
