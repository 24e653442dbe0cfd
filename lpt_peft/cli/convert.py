"""`lpt-peft convert CHECKPOINT FOLDER`: a checkpoint of the paper's own program to a prompt file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from lpt_peft.cli.common.options import Json
from lpt_peft.errors import ConfigError, HubError

if TYPE_CHECKING:
    from lpt_peft.checkpoint.convert_official import Published


def convert(
    checkpoint: tyro.conf.Positional[Path],
    folder: tyro.conf.Positional[Path],
    /,
    *,
    tag: str = "augreg_in21k",
    compare: bool = True,
    num_heads: int | None = None,
    as_json: Json = False,
) -> None:
    """Convert a published checkpoint and say whether the backbone inside it is the pretrained one.

    Args:
        checkpoint: The .pth file; it is loaded without running code.
        folder: For config.json and prompts.safetensors; made if need be.
        tag: timm's tag of the pretrained weights to compare with; they are downloaded.
        compare: With --no-compare nothing is downloaded, and the prompt file names no pretrained weights.
        num_heads: Heads of the backbone, where it is not one for each 64 of its width.
        as_json: Print one JSON object.
    """
    from lpt_peft.backbones.loading import build
    from lpt_peft.checkpoint.convert_official import EPS, read_published, write_published
    from lpt_peft.hub.errors import hub_errors

    published = read_published(checkpoint, num_heads=num_heads)
    pretrained, why = None, "nothing was compared"
    if compare:
        try:
            with hub_errors("Downloading the backbone", f"{published.architecture}.{tag}", None):
                pretrained = build(_info(published, tag))
        except (ConfigError, HubError) as error:
            why = str(error)
    same = write_published(published, folder, source=checkpoint.name, pretrained=pretrained)
    name = f"{published.architecture}.{tag}"
    if as_json:
        answer = {"folder": str(folder), "architecture": published.architecture, "pretrained": same, "compared": name}
        print(json.dumps(answer | ({"reason": why} if same is None else {})))
        return
    print(f"{folder}: prompts of {checkpoint.name} for {published.architecture}, LayerNorm eps {EPS:g}")
    if same is None:
        print(f"Not known whether the backbone inside is the pretrained {name}: {why}")
    elif same:
        print(f"The backbone inside is the pretrained {name}: from_pretrained({str(folder)!r}) builds it.")
    else:
        print(f"The backbone inside is NOT the pretrained {name}: the prompts work on the one inside alone.")


def _info(published: Published, tag: str) -> dict[str, object]:
    return {"library": "timm", "architecture": published.architecture, "pretrained_tag": tag, "model_args": {}}
