"""Atomic and durable writing of files and folders."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from lpt_peft.errors import ConfigError

_ABANDONED_SECONDS = 3600.0  # no write takes this long


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file in one step: readers see the old content or the new, even if the process is killed or power fails.

    A symbolic link at `path` is replaced; the file that it points to stays as it is. Temporary files that killed
    processes left are removed after an hour.

    Args:
        path: The file; its folder is created if missing.
        data: The whole content.

    Raises:
        ConfigError: The folder is a file.
        OSError: The disk is full, or the folder is not writable; the old content is still there.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        _write_synced(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    _remove_abandoned(path)


def write_atomic_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder in one step: it is complete as soon as it exists.

    Args:
        path: The folder, which does not exist yet; parents are created if missing.
        files: Name and content of each file.

    Raises:
        ConfigError: A parent is a file.
        OSError: The disk is full, the parent is not writable, or the folder exists; nothing is left behind.
    """
    with new_folder(path) as temporary:
        for name, data in files.items():
            (temporary / name).write_bytes(data)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a new folder in one step: a context with a temporary folder, which is renamed to `path` at its end.

    Args:
        path: The folder, which does not exist yet; parents are created if missing.

    Yields:
        The temporary folder beside it, empty. After an exception it is removed.

    Raises:
        ConfigError: A parent is a file.
        OSError: The disk is full, the parent is not writable, or the folder exists; nothing is left behind.
    """
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for folder in (temporary, *(item for item in temporary.rglob("*") if item.is_dir())):
            for file in folder.iterdir():
                if file.is_file():
                    _sync_file(file)
            _sync_folder(folder)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder and its parents where they are missing.

    Raises:
        ConfigError: The folder or one of its parents is a file.
        OSError: A parent is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next((parent for parent in (path, *path.parents) if parent.exists() and not parent.is_dir()), path)
        raise ConfigError(f"{path} must be a folder, but {file} is a file. Choose another folder.") from error


def _write_synced(path: Path, data: bytes) -> None:
    # Not tempfile: its files are private to the user, and moving them into place would keep that.
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_file(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.tmp")
    for other in path.parent.iterdir():
        if pattern.fullmatch(other.name):
            with suppress(FileNotFoundError):
                if time.time() - other.stat().st_ctime > _ABANDONED_SECONDS:
                    other.unlink()
