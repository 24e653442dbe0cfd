"""Prompts from a folder or from the Hugging Face Hub: read, onto a ViT, or onto one that is wrapped already.

Not here: transfer (`pull.py`), format and checks (`lpt_peft.checkpoint`).
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.backbones.loading import build
from lpt_peft.checkpoint import (
    CheckBackbone,
    Part,
    PromptFile,
    decode,
    read_prompt_file,
    swap_prompts,
    wrap_prompts,
)
from lpt_peft.checkpoint.pretrained import check_choice
from lpt_peft.errors import ConfigError
from lpt_peft.hub.errors import Token, hub_errors
from lpt_peft.hub.pull import Place, check_subfolder, pull

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def read_prompts(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: Token = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> PromptFile:
    """Read a prompt file from a folder, or from a repository of the Hub.

    Args:
        source: A folder where there is one of that name (a `Path` is always a folder), else "owner/name".
        revision: Branch, tag or commit; for repositories only.
        subfolder: Where in the folder or repository.
        token: True or None for the one logged in with, False for none, or the token itself.
        cache_dir: The client's cache; None is its own.
        local_files_only: Do not ask the Hub, take what the cache holds.
        force_download: Download what the cache holds already.

    Raises:
        PromptFileError: The file is refused; the class tells why.
        HubError: The Hub did not give it; the class tells why.
        ConfigError: An argument is out of range.
    """
    if is_repository(source):
        pulled = pull(
            Place(
                repo_id=str(source),
                revision=revision,
                subfolder=subfolder,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        )
        return decode(pulled.config, pulled.weights)
    if revision is not None:
        raise ConfigError(f"revision={revision!r} is of a repository, and {source} is a folder: leave it out.")
    check_subfolder(subfolder)
    return read_prompt_file(Path(source, subfolder) if subfolder else source)


def is_repository(source: str | PathLike[str]) -> bool:
    """A text that names no file or folder here and may name a repository."""
    if not isinstance(source, str) or _REPO_ID.fullmatch(source) is None:
        return False
    try:
        return not Path(source).exists()
    except OSError:  # a name too long for a folder
        return True


def from_pretrained(
    source: str | PathLike[str],
    vit: nn.Module | None = None,
    *,
    check_backbone: CheckBackbone = "error",
    head_dropout: float = 0.1,
    kind: type[LongTailPromptAdapter] = LongTailPromptAdapter,
    **place: Any,
) -> LongTailPromptAdapter:
    """Wrap a ViT with the prompts of a folder or repository; an error leaves it as it was.

    Args:
        source: As in `read_prompts`.
        vit: The very backbone, not wrapped; None builds the timm model that the file names, pretrained, in eval mode.
        check_backbone: As in `lpt_peft.checkpoint.load_prompts`, for a backbone that was built, too.
        head_dropout: Dropout before the head, while training.
        kind: The adapter's class.
        **place: The other arguments of `read_prompts`.

    Raises:
        PromptFileError: The file is refused, or is for another backbone.
        HubError: The Hub did not give the prompts or the backbone.
        BackboneError: The ViT cannot take prompts, or is wrapped already.
        ConfigError: An argument is out of range, or there is no ViT and it cannot be built here.
    """
    check_choice(check_backbone)
    prompts = read_prompts(source, **place)
    if vit is None:
        info = prompts.config["backbone"]
        with hub_errors("Downloading the backbone", str(info["architecture"]), place.get("token")):
            vit = build(info)
    return wrap_prompts(prompts, vit, check_backbone=check_backbone, head_dropout=head_dropout, kind=kind)


def swap_from(
    adapter: LongTailPromptAdapter,
    source: str | PathLike[str],
    *,
    part: Part = "all",
    check_backbone: CheckBackbone = "error",
    **place: Any,
) -> None:
    """Give a wrapped ViT the prompts of a folder or repository: see `lpt_peft.checkpoint.swap_prompts`.

    Args:
        adapter: Stays on its ViT, which is not touched.
        source: As in `read_prompts`.
        part: "all", or "shared" for the shared prompts alone.
        check_backbone: As in `lpt_peft.checkpoint.load_prompts`.
        **place: The other arguments of `read_prompts`.

    Raises:
        PromptFileError: The file is refused, or is for another backbone; nothing changed.
        HubError: The Hub did not give the prompts; nothing changed.
        ConfigError: An argument is out of range.
    """
    check_choice(check_backbone)
    swap_prompts(adapter, read_prompts(source, **place), part=part, check_backbone=check_backbone)
