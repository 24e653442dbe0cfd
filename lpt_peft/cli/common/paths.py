"""Rules of the paths on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lpt_peft.errors import ConfigError

_HOME = re.compile(r"((?:--[\w.-]+=)?(?:hf:|cifar100?-lt[-\d.]*:)?)(~(?:[/\\].*)?)", re.DOTALL)


def expand_home(words: Sequence[str]) -> list[str]:
    """Expand `~` at the start of a path, which shells leave as it is in `--output=~/run` and in `hf:~/data`.

    `~user` is left to the shell, and so are variables such as `$HOME`, which every shell expands everywhere.

    Raises:
        ConfigError: The home directory is unknown.
    """
    return [f"{match[1]}{home_path(match[2])}" if (match := _HOME.fullmatch(word)) else word for word in words]


def home_path(text: str) -> Path:
    """A path with `~` expanded.

    Raises:
        ConfigError: The home directory is unknown.
    """
    try:
        return Path(text).expanduser() if re.match(r"~(?:[/\\]|$)", text) else Path(text)
    except RuntimeError as error:
        raise ConfigError(f"{text}: the home directory is unknown. Set HOME, or give the full path.") from error


def check_new_folder(folder: Path) -> None:
    """Refuse a folder such as ~name/run, whose home directory the shell did not find or did not expand.

    Raises:
        ConfigError: The path starts with "~".
    """
    if str(folder).startswith("~"):
        user = folder.parts[0]
        raise ConfigError(
            f"{folder}: the home directory {user} is unknown, or the shell did not expand it. Give the full path, such "
            f"as {Path.cwd() / folder} for a folder named {user} here."
        )
