"""A lock on an output folder, released by the system when the process ends, however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lpt_peft._files import make_folder
from lpt_peft.errors import StateError
from lpt_peft.recipe.resume.folders import write_errors

_LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created if missing; without effect on systems without `flock`.

    Raises:
        StateError: Another process holds it, or the folder is not writable.
    """
    try:
        import fcntl  # noqa: PLC0415 - Windows has none
    except ModuleNotFoundError:
        yield
        return
    with write_errors(folder):
        make_folder(folder)
        file = (folder / _LOCK).open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(
                f"Another lpt-peft compare is running in {folder}. Wait for it, stop it, or choose another --output."
            ) from error
        yield
