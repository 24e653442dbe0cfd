"""`lpt-peft convert CHECKPOINT FOLDER`: convert a checkpoint of the paper's program to a prompt file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from lpt_peft.cli.common.options import Json
from lpt_peft.cli.common.paths import check_new_folder
from lpt_peft.errors import ConfigError, HubError, PromptFileFormatError

if TYPE_CHECKING:
    from lpt_peft.checkpoint.convert_official import OfficialCheckpoint


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
    """Convert a checkpoint of the paper's program, and report whether its backbone is the pretrained model.

    Args:
        checkpoint: The .pth file; it is loaded without running code.
        folder: Folder of the prompt file; created if missing.
        tag: timm's tag of the pretrained weights to compare with; they are downloaded.
        compare: With --no-compare nothing is downloaded, and the prompt file names no pretrained weights.
        num_heads: Heads of the backbone, if not its width divided by 64.
        as_json: Print one JSON object.
    """
    from lpt_peft.backbones.loading import build
    from lpt_peft.checkpoint.convert_official import EPS, read_official, write_official
    from lpt_peft.cli.common.streams import print_json, print_text
    from lpt_peft.hub.errors import hub_errors

    check_new_folder(folder)
    if checkpoint.suffix == ".safetensors":
        raise PromptFileFormatError(
            f"{checkpoint} is a safetensors file, and the paper's program saves .pth files. A prompt file needs no "
            "conversion: lpt-peft inspect checks it."
        )
    try:
        official = read_official(checkpoint, num_heads=num_heads)
    except PromptFileFormatError as error:
        if error.__cause__ is None:
            raise
        raise PromptFileFormatError(
            f"{checkpoint} is not a checkpoint of the paper's program: torch cannot load it without running code. Give "
            "the .pth file that the program saved."
        ) from error
    pretrained, why = None, "nothing was compared"
    if compare:
        try:
            with hub_errors("Downloading the backbone", f"{official.architecture}.{tag}", None):
                pretrained = build(_info(official, tag))
        except (ConfigError, HubError) as error:
            why = str(error)
    same = write_official(official, folder, source=checkpoint.name, pretrained=pretrained)
    name = f"{official.architecture}.{tag}"
    if as_json:
        answer = {"folder": str(folder), "architecture": official.architecture, "pretrained": same, "compared": name}
        print_json(answer | ({"reason": why} if same is None else {}))
        return
    print_text(f"{folder}: prompts of {checkpoint.name} for {official.architecture}, LayerNorm eps {EPS:g}")
    if same is None:
        print_text(f"Unknown whether its backbone is the pretrained {name}: {why}")
    elif same:
        print_text(f"Its backbone is the pretrained {name}: from_pretrained({str(folder)!r}) builds it.")
    else:
        print_text(
            f"Its backbone is NOT the pretrained {name}: the prompts work only on the backbone in the checkpoint."
        )


def _info(official: OfficialCheckpoint, tag: str) -> dict[str, object]:
    return {"library": "timm", "architecture": official.architecture, "pretrained_tag": tag, "model_args": {}}
