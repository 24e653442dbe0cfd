"""`lpt-peft doctor BACKBONE`: report whether a ViT takes prompts, and what would be attached and trained."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import tyro

from lpt_peft.cli.common.backbone_names import check_backbone_name
from lpt_peft.cli.common.exit_codes import FAILED, OK
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
) -> int:
    """Report what `LongTailPromptAdapter.wrap` would do with a backbone; nothing is downloaded.

    Args:
        backbone: A model name of timm, or LIBRARY/NAME such as transformers/dinov2; with --list, a pattern.
        listing: Print which models match the pattern and take prompts; without a pattern, a table of all families.
        num_classes: Classes of the new head.
        prompt_length: Tokens of a prompt in each block.
        pool_size: Number of groups.
        as_json: Print one JSON document.
    """
    from lpt_peft.cli.common.streams import print_json, print_text

    if listing:
        from lpt_peft.cli.common.doctor_list import print_support

        print_support(backbone, as_json=as_json)
        return OK
    if not backbone:
        raise ConfigError("doctor needs the name of a backbone, such as vit_base_patch16_224, or --list.")
    for flag, value in (("num-classes", num_classes), ("prompt-length", prompt_length), ("pool-size", pool_size)):
        if value < 1:
            raise ConfigError(f"--{flag} {value} must be at least 1.")
    try:
        check_backbone_name(backbone)
        sizes = {"prompt_length": prompt_length, "pool_size": pool_size, "top_k": min(2, pool_size)}
        report = examine(backbone, num_classes, **sizes)
    except LPTError as error:
        if as_json:
            print_json({"backbone": backbone, "supported": False, "reason": str(error)})
            return FAILED
        raise
    if as_json:
        print_json(report)
    else:
        print_text(_text(report))
    return OK


def examine(name: str, num_classes: int, **options: Any) -> dict[str, Any]:
    """Build the backbone without weights, wrap it, and return the report.

    Raises:
        BackboneError: No installed library has such a model, or it cannot take prompts.
        ConfigError: A number is out of range.
    """
    import timm

    from lpt_peft.adapter import PHASES, LongTailPromptAdapter
    from lpt_peft.backbones import find_backbone, listing

    entry = listing.find(name)
    if entry is None:
        library, _, rest = name.partition("/")
        near = listing.closest(name, library if rest and any(listing.entries(library)) else "timm")
        raise BackboneError(f'No installed library has a model "{name}". Similar names: {", ".join(near)}.')
    vit = entry.build()
    modules = Counter(type(module).__name__ for module in vit.modules())
    adapter = LongTailPromptAdapter.wrap(vit, num_classes, **options)
    attached = {
        kind: count
        for kind, count in sorted(modules.items())
        if count - Counter(type(module).__name__ for module in vit.modules())[kind]
    }
    trained = {}
    for phase in PHASES:
        adapter.phase = phase
        trained[phase] = {n: p.numel() for n, p in adapter.named_parameters() if p.requires_grad}
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
        "trained_parameters": trained,
        "prompt_parameters": prompts,
        "prompt_share": prompts / info.num_parameters,
        "preprocess": adapter.preprocess(),
        "pretrained": timm.is_model_pretrained(entry.name) if entry.library == "timm" else None,
    }


def _text(report: dict[str, Any]) -> str:
    attached = ", ".join(f"{count} x {kind}" for kind, count in report["attached"].items())
    upper = report["blocks"] - report["shared_layers"]
    preprocess = report["preprocess"]
    lines = [
        f"{report['backbone']} ({report['library']}): takes prompts, checked on random tokens.",
        f"  attached      {attached}",
        f"  prompts       shared in all {report['blocks']} blocks, groups in the last {upper}; width {report['width']}",
        f"  frozen        {report['frozen_parameters']:,} parameters",
        *(
            f"  phase {phase:8}" + ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            for phase, sizes in report["trained_parameters"].items()
        ),
        f"  both phases   {report['prompt_parameters']:,} parameters besides the head, {report['prompt_share']:.2%}",
        f"  preprocess    {' x '.join(map(str, preprocess['input_size']))}, mean {preprocess['mean']}, "
        f"std {preprocess['std']}, {preprocess['interpolation']}, crop {preprocess['crop_pct']:g}",
    ]
    if report["pretrained"] is False:
        lines.append("  note          timm has no weights of this name: mean, std and crop are its defaults")
    return "\n".join(lines)
