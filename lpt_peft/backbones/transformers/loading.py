"""Build the pretrained transformers model that a prompt file names, from a class that the installed library lists.

Weights come as safetensors from the Hub repository that the file names, at its commit where the file names one
(transformers 5.23 tells none of a model it has loaded). Not here: timm's models, and the choice between (`loading.py`).
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
    """Why `load` would refuse before any download; None where it would try."""
    name = info["architecture"]
    if name not in _classes():
        return f"transformers {transformers.__version__} has no such model"
    if info["hub_id"] is None or not _REPO_ID.fullmatch(info["hub_id"]):
        return "the file names no Hub repository of its weights"
    if info["hub_revision"] is not None and not _REVISION.fullmatch(info["hub_revision"]):
        return f"{info['hub_revision']!r:.60} is no commit"
    return None


def load(info: Mapping[str, Any]) -> nn.Module:
    """The model of the class, repository and commit that the file names, in eval mode.

    Its sizes are compared with the file's on the meta device before any weight is downloaded.

    Raises:
        ConfigError: The repository holds a model of another class or size.
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
                f"{info['hub_id']} on the Hub has {size} {getattr(found, size)}, the prompts were learnt on one of "
                f"{info[size]}. Give the model itself, from_pretrained(folder, vit)."
            )
    model: nn.Module = model_class.from_pretrained(info["hub_id"], use_safetensors=True, config=config, **source)
    return model.eval()


def _check_sizes(hub_id: str, config: Mapping[str, Any]) -> None:
    """Refuse numbers, also of nested configs, that would take for ever even on the meta device."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_sizes(hub_id, value)
        elif isinstance(value, int) and value > (_MAX_LAYERS if "layers" in name or "depth" in name else _MAX_SIZE):
            raise ConfigError(f"{hub_id} on the Hub has {name:.60}={value}, which no model here has. Is it a model?")


def _classes() -> frozenset[str]:
    """Every class that transformers itself lists as a base model, an image model or an image classifier."""
    names: set[str] = set()
    for listing in _LISTS:
        for entry in getattr(modeling_auto, listing, {}).values():
            names.update([entry] if isinstance(entry, str) else entry)
    return frozenset(names)
