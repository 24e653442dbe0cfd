"""The two files of a prompt file, as bytes: found and opened with care, written so that no reader is fooled.

Not here: what the bytes mean (`schema.py`, `tensors.py`).
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from lpt_peft.errors import PromptFileFormatError, PromptFileNotFoundError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "prompts.safetensors"
_LEFT = re.compile(rf"\.({re.escape(CONFIG_NAME)}|{re.escape(WEIGHTS_NAME)})\.[0-9a-f]{{32}}\.(new|old)")
_MOST_LEFT = 64
_LEFT_SECONDS = 3600.0  # no writer is at work for so long
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file, or a link to one, for reading; gives the stream and the size.

    Raises:
        PromptFileNotFoundError: It is not there.
        PromptFileFormatError: It is a directory, a pipe or a device: opening one could wait for ever. Or it cannot be
            opened: no permission, a name too long.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        descriptor = (
            os.open(path, _READ_FLAGS) if regular else None
        )  # does not wait, should a pipe have taken its place
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PromptFileNotFoundError(
            f"{path} does not exist. A prompt file is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, as "
            "adapter.save_pretrained(folder) writes it."
        ) from error
    except (OSError, ValueError) as error:  # a name too long, a loop of links, no permission
        raise PromptFileFormatError(f"{path} cannot be opened: {error}. Give another folder.") from error
    if descriptor is None:
        raise PromptFileFormatError(f"{path} is not a regular file. A prompt file has two: give another folder.")
    with open(descriptor, "rb") as stream:  # noqa: PTH123 - a descriptor, not a path
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PromptFileFormatError(f"{path} is not a regular file.")
        yield stream, status.st_size


def state_of(folder: Path) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """What tells one version of (config.json, prompts.safetensors) from another; None for one that is not to be had."""
    return _identity(folder / CONFIG_NAME), _identity(folder / WEIGHTS_NAME)


def left_configs(folder: Path) -> list[Path]:
    """Copies of config.json beside it, newest first: of a writer that was killed, or of one at work."""
    with suppress(FileNotFoundError, NotADirectoryError):
        names = [path for path in folder.iterdir() if (m := _LEFT.fullmatch(path.name)) and m[1] == CONFIG_NAME]
        return sorted(names, key=_seconds_since)[:_MOST_LEFT]
    return []


def write_pair(folder: Path, config: bytes, weights: bytes) -> None:
    """Put both files into `folder`, which is made if need be; nothing is written where they are there already.

    A reader sees the old pair or the new: the old config.json is put aside first, the new one comes last, and where
    the writer is killed in between, one of the two copies beside it belongs to the weights that are there. After an
    error or Ctrl-C the pair is the old one or the new, whole, and no other file is left behind.

    Raises:
        PromptFileFormatError: One of the two names is taken by something that is no regular file.
        OSError: The disk is full, or the folder may not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    same_config, same_weights = _holds(config_path, config), _holds(weights_path, weights)
    if same_config and same_weights:
        return
    mark = uuid4().hex
    new_config, new_weights, old_config = (
        folder / f".{name}.{mark}.{kind}"
        for name, kind in ((CONFIG_NAME, "new"), (WEIGHTS_NAME, "new"), (CONFIG_NAME, "old"))
    )
    try:
        write_through(new_config, config)
        write_through(new_weights, weights)
        with suppress(FileNotFoundError):
            config_path.replace(old_config)
        new_weights.replace(weights_path)
        new_config.replace(config_path)
        sync_folder(folder)
    finally:
        if not config_path.exists() and weights_path.exists():  # an error or Ctrl-C came between: go back, or on
            with suppress(FileNotFoundError):
                (old_config if new_weights.exists() else new_config).replace(config_path)
        for path in (new_config, new_weights, old_config):
            path.unlink(missing_ok=True)
    for path in folder.iterdir():  # of writers that were killed: the pair is whole again without them
        if _LEFT.fullmatch(path.name) and _seconds_since(path) > _LEFT_SECONDS:
            path.unlink(missing_ok=True)


def _holds(path: Path, content: bytes) -> bool:
    try:
        with open_regular(path) as (stream, size):
            return size == len(content) and stream.read(size + 1) == content
    except PromptFileNotFoundError:
        return False


def write_through(path: Path, content: bytes) -> None:
    """Write a new file that is on the disk when this returns."""
    # Not tempfile: its files are private to the user, and the move into place would keep that.
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Have the folder's names on the disk when this returns."""
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # missing, or out of reach: opening it says why
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _seconds_since(path: Path) -> float:
    """Since it was written or put aside; a file that is gone by now is new."""
    try:
        return time.time() - path.stat().st_ctime
    except FileNotFoundError:
        return 0.0
