"""Files of a prompt file on disk: opened with care, and never written over another library's `config.json`.

Not here: what the bytes mean (`schema.py`, `tensors.py`), atomic writing (`lpt_peft._files`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lpt_peft._files import make_folder, write_atomic
from lpt_peft._json import dumps, loads
from lpt_peft.checkpoint.schema import FORMAT
from lpt_peft.errors import ConfigError, PromptFileExistsError, PromptFileFormatError, PromptFileNotFoundError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "prompts.safetensors"
MAX_COPY_BYTES = 2**24
"""Most bytes of a `config.json` that are read; the indented copy is longer than the header."""

# ENOENT: a file system without new folders, such as /proc.
_IMPOSSIBLE_NAME = frozenset((errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL))
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def expand_user(path: str | os.PathLike[str], name: str = "folder") -> Path:
    """Return a path with `~` or `~user` at its start expanded.

    Args:
        path: The path of a caller.
        name: Name of the argument in messages.

    Raises:
        ConfigError: It is not a path, or the home directory is unknown.
    """
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise ConfigError(f"{name}={path!r:.80} must be a path, as text or pathlib.Path.")
    text = os.path.expanduser(path)  # noqa: PTH111 - Path drops the ./ of "./~x", a folder named ~x
    if text.startswith("~") and not Path(text).exists():
        raise ConfigError(
            f"{name}={text!r:.300}: this home directory is unknown. Give the full path, also of a folder whose name "
            "begins with ~."
        )
    expanded = Path(text)
    return expanded.absolute() if str(expanded).startswith("~") else expanded


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file, or a link to a regular file, for reading; yields the stream and the size in bytes.

    Raises:
        PromptFileNotFoundError: It does not exist.
        PromptFileFormatError: It is a folder, a pipe or a device, which could block, or it cannot be opened: no
            permission, a name too long.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        # O_NONBLOCK: if a pipe replaces the file meanwhile, opening it does not wait.
        descriptor = os.open(path, _READ_FLAGS) if regular else None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PromptFileNotFoundError(
            f"{path} does not exist.{_nearby(path)} A prompt file is a folder with {WEIGHTS_NAME}, as "
            "adapter.save_pretrained(folder) writes it."
        ) from error
    except (OSError, ValueError) as error:  # a name too long, a loop of links, no permission
        raise PromptFileFormatError(f"{path} cannot be opened: {error}. Give another folder.") from error
    if descriptor is None:
        raise PromptFileFormatError(f"{path} is not a regular file. Give another folder.")
    with open(descriptor, "rb") as stream:  # noqa: PTH123 - a descriptor, not a path
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PromptFileFormatError(f"{path} is not a regular file. Give another folder.")
        yield stream, status.st_size


def _nearby(path: Path) -> str:
    """Where the prompt file is, if it is close to a missing path."""
    folder = path.parent
    if path.name != WEIGHTS_NAME:
        return ""
    if folder.is_file():
        return f" {folder} is a file: give its folder, {folder.parent}."
    inner = folder / "prompts"
    return f" {inner} is a prompt file: give that folder." if (inner / WEIGHTS_NAME).is_file() else ""


def write_files(folder: Path, weights: bytes, config: bytes) -> None:
    """Write `prompts.safetensors`, then its readable copy `config.json`; see `write_folder`.

    A reader finds the old prompts or the new, complete, at any moment.

    Args:
        folder: Created if missing.
        weights: Content of `prompts.safetensors`.
        config: Content of `config.json`.
    """
    write_folder(folder, {WEIGHTS_NAME: weights, CONFIG_NAME: config}, FORMAT)


def write_folder(folder: Path, files: Mapping[str, bytes], format: str) -> None:
    """Write files in order, each in one step; files that hold the bytes are not touched.

    Args:
        folder: Created if missing.
        files: Content by name; `config.json` is among them.
        format: Value of "format" in `config.json`.

    Raises:
        PromptFileExistsError: `config.json` is of another library; nothing was written.
        PromptFileFormatError: One of the names is not a regular file; nothing was written.
        ConfigError: The folder is a file, or cannot be created.
        OSError: The disk is full, or the folder is not writable.
    """
    try:
        make_folder(folder)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, OSError) and error.errno not in _IMPOSSIBLE_NAME:
            raise
        raise ConfigError(f"The folder {str(folder)!r:.300} cannot be created: choose another folder.") from error
    contents = {folder / name: data for name, data in files.items()}
    limits = {path: MAX_COPY_BYTES if path.name == CONFIG_NAME else len(data) for path, data in contents.items()}
    found = {path: _read(path, limit) for path, limit in limits.items()}
    refuse_foreign_config(folder, found[folder / CONFIG_NAME], format)
    for path, data in contents.items():
        if found[path] != data:
            write_atomic(path, data)


def refuse_foreign_config(folder: Path, existing: bytes | None, format: str = FORMAT) -> None:
    """Refuse to replace a `config.json` of another format.

    Args:
        folder: Its folder.
        existing: Its content, from `read_copy`; None if it is missing.
        format: The format to write.

    Raises:
        PromptFileExistsError: It has another format.
    """
    if existing is not None and not is_own_config(existing, format):
        raise PromptFileExistsError(foreign_config(str(folder), format))


def is_own_config(data: bytes, format: str = FORMAT) -> bool:
    """Whether a `config.json` has this format; by default, whether it is the readable copy of a prompt file."""
    if len(data) > MAX_COPY_BYTES:
        return False
    try:
        return loads(data, CONFIG_NAME, PromptFileFormatError).get("format") == format
    except PromptFileFormatError:
        return False


def foreign_config(place: str, format: str = FORMAT) -> str:
    """Message about another library's `config.json`."""
    kind, cure = ("a model file of lpt_peft", "Choose another folder.")
    if format == FORMAT:
        kind, cure = "a prompt file", 'Choose another place, or give subfolder="prompts", here and for loading.'
    return (
        f"{place} already holds a {CONFIG_NAME} that does not belong to {kind}, such as that of a transformers "
        f'model (it has no "format": "{format}"). It was not overwritten. {cure}'
    )


def compare_copy(copy: bytes | None, config: dict[str, object]) -> str | None:
    """How `config.json` differs from the configuration of the file.

    Args:
        copy: Content of `config.json`; None if it is missing.
        config: The whole configuration, from the header of `prompts.safetensors`.

    Returns:
        A short text, or None if they are equal.
    """
    if copy is None:
        return "is missing"
    try:
        found = loads(copy[: MAX_COPY_BYTES + 1], CONFIG_NAME, PromptFileFormatError)
    except PromptFileFormatError as error:
        return f"cannot be read ({error!s:.200})"
    # As text: Python considers 1, 1.0 and True equal.
    differing = [key for key in sorted(found.keys() | config.keys()) if dumps(found.get(key)) != dumps(config.get(key))]
    return f"differs in {', '.join(differing[:8])}" if differing else None


def read_copy(folder: Path) -> bytes | None:
    """Content of `config.json`, None if it is missing.

    Raises:
        PromptFileFormatError: It is not a regular file.
    """
    return _read(folder / CONFIG_NAME, MAX_COPY_BYTES)


def _read(path: Path, most: int) -> bytes | None:
    try:
        with open_regular(path) as (stream, _):
            return stream.read(most + 1)
    except PromptFileNotFoundError:
        return None
