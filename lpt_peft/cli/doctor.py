"""`lpt-peft doctor BACKBONE`: what would be attached to a ViT and learnt, or why it cannot be."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import timm
import tyro

from lpt_peft.adapter import PHASES, LongTailPromptAdapter
from lpt_peft.backbones import find_backbone
from lpt_peft.cli.options import Json
from lpt_peft.errors import BackboneError, LPTError


def doctor(
    backbone: tyro.conf.Positional[str],
    /,
    num_classes: int = 1000,
    prompt_length: int = 10,
    pool_size: int = 20,
    as_json: Json = False,
) -> None:
    """Say what `LongTailPromptAdapter.wrap` would do with a backbone; nothing is downloaded.

    Args:
        backbone: A model name of timm, such as vit_base_patch16_224.
        num_classes: Classes of the new head.
        prompt_length: Tokens of a prompt in each block.
        pool_size: Groups.
        as_json: Print one JSON object.
    """
    try:
        report = examine(backbone, num_classes, prompt_length=prompt_length, pool_size=pool_size)
    except LPTError as error:
        if as_json:
            print(json.dumps({"backbone": backbone, "supported": False, "reason": str(error)}))
            sys.exit(1)
        raise
    print(json.dumps(report, indent=2) if as_json else _text(report))


def examine(name: str, num_classes: int, **options: int) -> dict[str, Any]:
    """Build the backbone with random weights, wrap it, and tell.

    Raises:
        BackboneError: timm has no such model, or it cannot take prompts.
        ConfigError: A number is out of range.
    """
    try:
        vit = timm.create_model(name, pretrained=False)
    except RuntimeError as error:  # what timm raises for an unknown name
        near = timm.list_models(f"*{name}*")[:5] or timm.list_models("vit_base*")[:5]
        raise BackboneError(f'timm {timm.__version__} has no model "{name}". Near it: {", ".join(near)}.') from error
    modules = Counter(type(module).__name__ for module in vit.modules())
    adapter = LongTailPromptAdapter.wrap(vit, num_classes, **options)
    attached = {
        kind: count
        for kind, count in sorted(modules.items())
        if count - Counter(type(module).__name__ for module in vit.modules())[kind]
    }
    learnt = {}
    for phase in PHASES:
        adapter.phase = phase
        learnt[phase] = {n: p.numel() for n, p in adapter.named_parameters() if p.requires_grad}
    info = find_backbone(vit).info()
    prompts = adapter.config.num_prompt_parameters
    return {
        "backbone": name,
        "supported": True,
        "library": f"{info.library} {info.library_version}",
        "attached": attached,
        "blocks": info.depth,
        "shared_layers": adapter.config.first_group_layer,
        "width": info.embed_dim,
        "feature_width": adapter.config.feature_dim,
        "frozen_parameters": info.num_parameters,
        "learnt_parameters": learnt,
        "prompt_parameters": prompts,
        "prompt_share": prompts / info.num_parameters,
        "preprocess": adapter.backbone.preprocess(),
    }


def _text(report: dict[str, Any]) -> str:
    attached = ", ".join(f"{count} x {kind}" for kind, count in report["attached"].items())
    upper = report["blocks"] - report["shared_layers"]
    preprocess = report["preprocess"]
    lines = [
        f"{report['backbone']} ({report['library']}): prompts work here, checked on random tokens.",
        f"  attached      {attached}",
        f"  prompts       shared in all {report['blocks']} blocks, groups in the last {upper}; width {report['width']}",
        f"  frozen        {report['frozen_parameters']:,} parameters",
        *(
            f"  phase {phase:8}" + ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            for phase, sizes in report["learnt_parameters"].items()
        ),
        f"  both phases   {report['prompt_parameters']:,} parameters besides the head, {report['prompt_share']:.2%}",
        f"  preprocess    {' x '.join(map(str, preprocess['input_size']))}, mean {preprocess['mean']}, "
        f"std {preprocess['std']}, {preprocess['interpolation']}, crop {preprocess['crop_pct']:g}",
    ]
    return "\n".join(lines)
