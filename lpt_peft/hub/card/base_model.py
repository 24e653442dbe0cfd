"""The backbone's id on the Hub, if the weights prove it."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from lpt_peft.backbones.fingerprint import fingerprint
from lpt_peft.checkpoint import PromptContent

_HEADS = ("head.", "head_dist.", "classifier.")


def base_model_of(content: PromptContent) -> str | None:
    """The backbone's Hub id, if the local cache holds that model and its weights are the backbone's.

    timm states a Hub id for randomly initialized models too, so the id alone proves nothing.
    """
    hub_id, revision = content.backbone.hub_id, content.backbone.hub_revision
    # The client joins the revision to a path and reads the file there, so only a commit is accepted.
    if hub_id is None or not (revision is None or re.fullmatch("[0-9a-f]{40}", revision)):
        return None
    try:
        path = try_to_load_from_cache(hub_id, "model.safetensors", revision=revision)
    except ValueError:  # not the name of a repository
        return None
    if not isinstance(path, str) or not Path(path).is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if not name.startswith(_HEADS)]  # noqa: SIM118 - not a dict
            found = fingerprint(file.get_tensor(name) for name in names)
    except (OSError, SafetensorError):
        return None
    return hub_id if found == content.fingerprint else None
