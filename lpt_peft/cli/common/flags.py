"""Flags of `lpt-peft train` in the messages of errors, which the library words for its own settings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lpt_peft._run_folder import MODEL_METHODS
from lpt_peft.errors import ConfigError
from lpt_peft.recipe.method_settings import METHODS, unused_fields
from lpt_peft.recipe.settings import PhaseSettings

if TYPE_CHECKING:
    from lpt_peft.cli.common.run_settings import PromptSettings

_PHASE_FLAG = re.compile(r"--((?:shared|group)\.([\w-]+))(?:=(.*))?", re.DOTALL)
GROUP_SIZES = frozenset({"pool_size", "top_k", "shared_layers", "query"})
"""Fields of `PromptSettings` that only method "lpt" uses."""
_SETTINGS = re.compile(r"\b(?:Phase|Train|Image|Prompt|Run)Settings: ")


def check_phase_flags(words: Sequence[str]) -> None:
    """Refuse values of --shared.* and --group.* that are out of range; tyro's message would not name the flag.

    Raises:
        ConfigError: A value is out of range.
    """
    kinds: dict[str, type] = {field.name: int if str(field.type) == "int" else float for field in fields(PhaseSettings)}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if (match := _PHASE_FLAG.fullmatch(word)) is None:
            continue
        flag, name, text = match[1], match[2].replace("-", "_"), following if match[3] is None else match[3]
        try:
            value: Any = kinds[name](text)
        except (KeyError, ValueError):
            continue  # tyro names the flag
        try:
            PhaseSettings(**{name: value})
        except ConfigError as error:
            rule = str(error).partition(" must be ")[2]
            raise ConfigError(f"--{flag} {text} must be {rule}") from error


def check_method_flags(words: Sequence[str]) -> None:
    """Refuse flags that the method of --method does not use.

    Those of --group.*, a file or a preset are only reported, by the summary of the run.

    Raises:
        ConfigError: Such a flag is given.
    """
    flags = [word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    method = parser.parse_known_args(list(words))[0].method
    if method not in METHODS:
        return  # the default, or tyro refuses it
    names = (
        unused_fields(method) | _unused_prompt_fields(method) | ({"start_from"} if method in MODEL_METHODS else set())
    )
    unused = {f"--{name.replace('_', '-')}" for name in names}
    if found := [flag for flag in flags if flag in unused]:
        raise ConfigError(f"{found[0]} has no effect with --method {method}: leave it out.")


def unused_sizes(prompts: PromptSettings, method: str) -> list[str]:
    """Return the sizes of prompts that a method does not use, and that differ from their defaults."""
    unused = _unused_prompt_fields(method)
    return [f.name for f in fields(prompts) if f.name in unused and getattr(prompts, f.name) != f.default]


def _unused_prompt_fields(method: str) -> frozenset[str]:
    if method in MODEL_METHODS:
        return GROUP_SIZES | {"prompt_length"}
    return GROUP_SIZES if method != "lpt" else frozenset()


def name_flags(message: str, words: Sequence[str]) -> str:
    """Replace the names of settings in a message by the flags that are among `words`.

    Example:
        >>> name_flags("ImageSettings: crop_pct=0.0 must be from 0.05 to 1.", ["train", "x", "--crop-pct", "0"])
        '--crop-pct 0.0 must be from 0.05 to 1.'
        >>> name_flags("ImageSettings: crop_pct=0.0 must be from 0.05 to 1.", ["train", "x", "--config=old.json"])
        'ImageSettings: crop_pct=0.0 must be from 0.05 to 1.'
    """
    flags = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}

    def flag(match: re.Match[str]) -> str:
        name = f"--{match[1].replace('_', '-')}"
        return f"{name} " if name in flags else match[0]

    named = re.sub(r"(?<![\w.\"'/-])([a-z]\w*)=", flag, message)
    return message if named == message else _SETTINGS.sub("", named)
