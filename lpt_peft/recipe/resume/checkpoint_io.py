"""Atomic checkpoint folders: `state.safetensors` and `state.json`.

A checkpoint is written to a temporary folder and renamed once its content is on disk. A process killed at any moment,
or a full disk, therefore leaves the previous checkpoints intact. Not here: their content (`checkpointing.py`).
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
_NAME = re.compile(r"\d-\w+-\d{8,}")  # as `checkpointing.py` builds them


def write_checkpoint(
    folder: Path, name: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], keep: int
) -> None:
    """Write `folder/name/`, then remove all but the last `keep` checkpoints, in the order of their names.

    Args:
        folder: Created if missing.
        name: An existing checkpoint of this name is left unchanged.
        tensors: On any device.
        numbers: Plain JSON; NaN and infinity are refused.
        keep: At least 1.

    Raises:
        StateError: The disk is full or the folder is not writable; earlier checkpoints are intact.
    """
    content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    text = json.dumps({**numbers, "sha256": digest}, indent=1, allow_nan=False).encode()
    try:
        make_folder(folder)
        _remove_leftovers(folder)
        if not (folder / name).exists():
            write_atomic_folder(folder / name, {TENSORS: content, NUMBERS: text})
        for old in checkpoints(folder)[:-keep]:
            _discard(old)
    except OSError as error:
        earlier = checkpoints(folder)
        intact = f"The last checkpoint, {earlier[-1]}, is intact" if earlier else "There is no earlier checkpoint"
        raise StateError(
            f"The checkpoint {folder / name} cannot be written: {error.strerror or error}. {intact}. Fix the cause and "
            "run the same command again."
        ) from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and numbers of a checkpoint.

    Raises:
        StateError: It is damaged.
    """
    try:
        numbers = loads((path / NUMBERS).read_bytes(), NUMBERS, StateError)
        content = (path / TENSORS).read_bytes()
        if hashlib.sha256(content).hexdigest() != numbers.pop("sha256"):
            raise ValueError(f"the bytes of {TENSORS} differ from those written")
        return load(content), numbers
    except (OSError, ValueError, KeyError, StateError) as error:
        raise StateError(
            f"The checkpoint {path} is damaged: {error}. Remove it to resume from the previous checkpoint."
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; other entries of the folder are ignored."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))
    return []


def remove_checkpoints(folder: Path) -> int:
    """Remove all checkpoints, newest first, so that a kill leaves only earlier ones; return their number."""
    found = checkpoints(folder)
    for path in reversed(found):
        _discard(path)
    return len(found)


def _discard(path: Path) -> None:
    aside = path.with_name(f"{path.name}.{uuid4().hex}{_TEMPORARY}")
    path.rename(aside)  # a half-removed checkpoint must not look complete
    shutil.rmtree(aside)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for path in folder.glob(f"*{_TEMPORARY}"):
        if _NAME.match(path.name):
            shutil.rmtree(path, ignore_errors=True)
