"""Building the pretrained transformers model that a prompt file names, from a class that the library lists.

Weights are safetensors of the Hub repository in the file, at the commit in the file if there is one (transformers 5.23
does not record the commit of a loaded model). Not here: other libraries (`lpt_peft/backbones/loading.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from lpt_peft.backbones.detect import find_backbone
from lpt_peft.errors import ConfigError

_LISTS = ("MODEL_MAPPING_NAMES", "MODEL_FOR_IMAGE_MAPPING_NAMES", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES")
_MAX_LAYERS, _MAX_SIZE = 1_000, 10_000_000
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[0-9a-f]{40}")


def why_not(info: Mapping[str, Any]) -> str | None:
    """Return why `load` would refuse before any download, or None."""
    name = info["architecture"]
    if name not in _classes():
        return f"transformers {transformers.__version__} has no such model"
    if info["hub_id"] is None or not _REPO_ID.fullmatch(info["hub_id"]):
        return "the file names no Hub repository of its weights"
    if info["hub_revision"] is not None and not _REVISION.fullmatch(info["hub_revision"]):
        return f"{info['hub_revision']!r:.60} is not a commit"
    return None


def load(info: Mapping[str, Any]) -> nn.Module:
    """Load the model of the class, repository and commit in the file, in eval mode.

    Its sizes are compared with the file's on the meta device before weights are downloaded.

    Raises:
        ConfigError: The repository contains a model of another class or size.
        Exception: Whatever transformers raises when the download fails.
    """
    model_class = getattr(transformers, info["architecture"])
    source = {"revision": info["hub_revision"]} if info["hub_revision"] else {}
    config = model_class.config_class.from_pretrained(info["hub_id"], **source)
    _check_sizes(info["hub_id"], config.to_dict())
    with torch.device("meta"):
        found = find_backbone(model_class(config)).info()
    for size in ("embed_dim", "depth", "num_heads", "num_parameters"):
        if getattr(found, size) != info[size]:
            raise ConfigError(
                f"{info['hub_id']} on the Hub has {size} {getattr(found, size)}, and the prompts were trained on a "
                f"model with {info[size]}. Pass the model: from_pretrained(folder, vit)."
            )
    model: nn.Module = model_class.from_pretrained(info["hub_id"], use_safetensors=True, config=config, **source)
    return model.eval()


def _check_sizes(hub_id: str, config: Mapping[str, Any]) -> None:
    """Refuse numbers, also in nested configs, that would take very long even on the meta device."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_sizes(hub_id, value)
        elif isinstance(value, int) and value > (_MAX_LAYERS if "layers" in name or "depth" in name else _MAX_SIZE):
            raise ConfigError(f"{hub_id} on the Hub has {name:.60}={value}, which is too large for a model.")


def _classes() -> frozenset[str]:
    """Classes that transformers lists as a base model, an image model or an image classifier."""
    names: set[str] = set()
    for listing in _LISTS:
        for entry in getattr(modeling_auto, listing, {}).values():
            names.update([entry] if isinstance(entry, str) else entry)
    return frozenset(names)
