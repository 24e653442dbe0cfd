"""Checks that folders are writable before a run needs them, and the errors of writing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from lpt_peft._files import make_folder
from lpt_peft.errors import LPTError, StateError

_CURE = "Choose another folder, change its permissions, or free disk space."


def check_folder(folder: Path) -> None:
    """Check that a file can be written into a folder, which is created if missing.

    Raises:
        ConfigError: It is a file.
        StateError: It is not writable; the message names the reason.
    """
    probe = folder / f".{uuid4().hex}"
    with write_errors(folder):
        make_folder(folder)
        try:
            probe.write_bytes(b"lpt_peft")
        finally:
            with suppress(OSError):
                probe.unlink()


@contextmanager
def write_errors(folder: Path, cure: str = _CURE) -> Iterator[None]:
    """Raise errors of the operating system as `StateError`, with the folder, the reason and a cure.

    Raises:
        StateError: Instead of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, LPTError):
            raise
        raise StateError(f"The folder {folder} is not writable: {error.strerror or error}. {cure}") from error
