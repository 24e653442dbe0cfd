"""The words of a `lpt-peft train` command that trains with given settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lpt_peft.cli.common.run_settings import RunSettings

_PREFIXES = {"prompts": "", "images": "", "training": ""}


def train_words(settings: Mapping[str, Any], output: str) -> list[str]:
    """Return DATA, the backbone, the output folder, and a flag for each setting that differs from its default.

    Args:
        settings: Content of settings.json, with "data".
        output: Folder of the new run.

    Raises:
        ConfigError: A setting is unknown or out of range.

    Example:
        >>> train_words({"data": "photos", "backbone": "glyph_vit", "training": {"seed": 1}}, "again")
        ['lpt-peft', 'train', 'photos', '--backbone', 'glyph_vit', '--output', 'again', '--seed', '1']
    """
    values = {name: value for name, value in settings.items() if name != "data"}
    run = RunSettings.from_dict(values)
    words = ["lpt-peft", "train", str(settings["data"]), "--backbone", run.backbone, "--output", output]
    defaults = RunSettings(backbone=run.backbone).to_dict()
    return words + _flags(run.to_dict(), defaults, "")


def _flags(values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> list[str]:
    words: list[str] = []
    for name, value in values.items():
        default, flag = defaults[name], f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            words += _flags(value, default, _PREFIXES.get(name, f"{prefix}{name}."))
        elif value == default:
            continue
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words
