"""Checkpoints on disk: `state.safetensors` and `state.json` in a folder each, whole or not there at all.

A checkpoint is written beside its place and moved there by one rename, after all of it is on the disk; so a run killed
at any moment, or a full disk, leaves the ones before. Not here: what a checkpoint means (`resume.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors.torch import load, save
from torch import Tensor

from lpt_peft._files import make_folder, write_atomic_folder
from lpt_peft._json import loads
from lpt_peft.errors import StateError

TENSORS, NUMBERS = "state.safetensors", "state.json"
_TEMPORARY = ".tmp"
_NAME = re.compile(r"\d-\w+-\d{8,}")  # as `resume.py` gives them


def write_checkpoint(
    folder: Path, name: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], keep: int
) -> None:
    """Write `folder/name/`, then remove all but the `keep` last ones, in the order of their names.

    Args:
        folder: Made if need be.
        name: Nothing is done where it exists.
        tensors: Of any device.
        numbers: Plain JSON; NaN and infinity are refused.
        keep: At least 1.

    Raises:
        StateError: The disk is full or the folder may not be written; what was there before is whole.
    """
    content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    text = json.dumps({**numbers, "sha256": digest}, indent=1, allow_nan=False).encode()
    try:
        make_folder(folder)
        _remove_left(folder)
        if not (folder / name).exists():
            write_atomic_folder(folder / name, {TENSORS: content, NUMBERS: text})
        for old in checkpoints(folder)[:-keep]:
            _discard(old)
    except OSError as error:
        before = checkpoints(folder)
        left = f"The last one, {before[-1]}, is whole" if before else "There was none before"
        raise StateError(
            f"The checkpoint {folder / name} cannot be written: {error}. {left}. Mend the cause and run the same "
            "command again."
        ) from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers of one checkpoint.

    Raises:
        StateError: It is damaged.
    """
    try:
        numbers = loads((path / NUMBERS).read_bytes(), NUMBERS, StateError)
        content = (path / TENSORS).read_bytes()
        if hashlib.sha256(content).hexdigest() != numbers.pop("sha256"):
            raise ValueError(f"the bytes of {TENSORS} are not those that were written")
        return load(content), numbers
    except (OSError, ValueError, KeyError, StateError) as error:
        raise StateError(
            f"The checkpoint {path} is damaged: {error}. Remove it, and the run goes on from the one before."
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The whole ones, oldest first; whatever else lies in the folder is not looked at."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))
    return []


def remove_checkpoints(folder: Path) -> None:
    """All of them, newest first, so that what a kill leaves is no later than what is gone."""
    for path in reversed(checkpoints(folder)):
        _discard(path)


def _discard(path: Path) -> None:
    aside = path.with_name(f"{path.name}.{uuid4().hex}{_TEMPORARY}")
    path.rename(aside)  # half of one must not look whole
    shutil.rmtree(aside)


def _remove_left(folder: Path) -> None:
    """What a killed run left half written or half removed."""
    for path in folder.glob(f"*{_TEMPORARY}"):
        if _NAME.match(path.name):
            shutil.rmtree(path, ignore_errors=True)
