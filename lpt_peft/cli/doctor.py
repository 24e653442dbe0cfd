"""`lpt-peft doctor BACKBONE`: what would be attached to a ViT and learnt, or why it cannot be."""

from __future__ import annotations

import json
import sys
from collections import Counter
from difflib import get_close_matches
from typing import Annotated, Any

import tyro

from lpt_peft.cli.common.options import Json
from lpt_peft.errors import BackboneError, ConfigError, LPTError


def doctor(
    backbone: tyro.conf.Positional[str] = "",
    /,
    *,
    listing: Annotated[bool, tyro.conf.arg(name="list")] = False,
    num_classes: int = 1000,
    prompt_length: int = 10,
    pool_size: int = 20,
    as_json: Json = False,
) -> None:
    """Say what `LongTailPromptAdapter.wrap` would do with a backbone; nothing is downloaded.

    Args:
        backbone: A model name of timm, such as vit_base_patch16_224, or one of another library behind its name:
            transformers/dinov2, torchvision/vit_b_16, open_clip/ViT-B-32. With --list, a pattern, such as "eva02*".
        listing: Print which models take prompts, and why the others do not: every name that fits the pattern, or
            the table of all families without one (which takes some minutes).
        num_classes: Classes of the new head.
        prompt_length: Tokens of a prompt in each block.
        pool_size: Groups.
        as_json: Print one JSON object.
    """
    if listing:
        from lpt_peft.cli.common.doctor_list import show_support

        show_support(backbone, as_json=as_json)
        return
    if not backbone:
        raise ConfigError("doctor needs the name of a backbone, such as vit_base_patch16_224, or --list.")
    try:
        report = examine(backbone, num_classes, prompt_length=prompt_length, pool_size=pool_size)
    except LPTError as error:
        if as_json:
            print(json.dumps({"backbone": backbone, "supported": False, "reason": str(error)}))
            sys.exit(1)
        raise
    print(json.dumps(report, indent=2) if as_json else _text(report))


def examine(name: str, num_classes: int, **options: int) -> dict[str, Any]:
    """Build the backbone without weights, wrap it, and tell.

    Raises:
        BackboneError: No installed library has such a model, or it cannot take prompts.
        ConfigError: A number is out of range.
    """
    import timm

    from lpt_peft.adapter import PHASES, LongTailPromptAdapter
    from lpt_peft.backbones import find_backbone
    from lpt_peft.backbones import listing as catalog

    entry = catalog.find(name)
    if entry is None:
        titles = [one.title for one in catalog.entries()]
        near = (
            get_close_matches(name, titles, 5, 0.5) or [title for title in titles if title.startswith("vit_base")][:5]
        )
        raise BackboneError(f'No installed library has a model "{name}". Near it: {", ".join(near)}.')
    vit = entry.build()
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
    prompts = adapter.prompt_config.num_prompt_parameters
    return {
        "backbone": name,
        "supported": True,
        "library": f"{info.library} {info.library_version}",
        "attached": attached,
        "blocks": info.depth,
        "shared_layers": adapter.prompt_config.first_group_layer,
        "width": info.embed_dim,
        "feature_width": adapter.prompt_config.feature_dim,
        "frozen_parameters": info.num_parameters,
        "learnt_parameters": learnt,
        "prompt_parameters": prompts,
        "prompt_share": prompts / info.num_parameters,
        "preprocess": adapter.backbone.preprocess(),
        "pretrained": timm.is_model_pretrained(entry.name) if entry.library == "timm" else None,
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
    if report["pretrained"] is False:
        lines.append("  note          timm has no weights under this name: mean, std and crop are its defaults")
    return "\n".join(lines)
