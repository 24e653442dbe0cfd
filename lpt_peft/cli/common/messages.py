"""Messages on standard error: errors of the operating system and warnings, in the command's own form."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lpt_peft._text import printable
from lpt_peft.cli.common.streams import wrap

_PACKAGE = str(Path(__file__).parents[2])
_ERRNO = re.compile(r"\[(?:Errno|WinError) -?\d+\] ")
_CURES = {
    errno.EACCES: "Change its permissions, or choose another path.",
    errno.EPERM: "Change its permissions, or choose another path.",
    errno.EROFS: "Choose a path on a disk that can be written.",
    errno.ENOSPC: "Free some space, or choose another disk.",
    errno.EDQUOT: "Free some space, or choose another disk.",
    errno.EEXIST: "Remove it, or choose another path.",
    errno.ENOTEMPTY: "Remove it, or choose another path.",
    errno.ENOTDIR: "A file is in the place of a folder: choose another path.",
    errno.EISDIR: "Give a file, not a folder.",
    errno.ENOENT: "Check the path.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.ELOOP: "Remove the symbolic link that leads back to itself.",
    errno.EMFILE: "Raise the limit on open files: ulimit -n.",
}


def notice(message: object) -> None:
    """Print a message on standard error, in the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print_message(message)


def print_message(message: object) -> None:
    """Print a message on standard error: one line, which is wrapped on a terminal."""
    text = f"lpt-peft: {tidy(message)}"
    print(wrap(text) if sys.stderr.isatty() else text, file=sys.stderr)


def text_of_error(error: OSError) -> str:
    """Path, reason and cure of an error of the operating system, as a sentence.

    Example:
        >>> text_of_error(FileExistsError(errno.EEXIST, "File exists", "run"))
        'run: File exists. Remove it, or choose another path.'
    """
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    reason = f"{' -> '.join(names)}: {error.strerror}" if names and error.strerror else error.strerror or str(error)
    cure = _CURES.get(error.errno or 0, "")
    return f"{without_errno(reason)}. {cure}".strip()


def without_errno(text: str) -> str:
    """A message of another library without "[Errno 17]" and without its full stop, to stand inside a sentence.

    Example:
        >>> without_errno("[Errno 17] File exists: 'run'."), without_errno("no such column.")
        ("File exists: 'run'", 'no such column')
    """
    return _ERRNO.sub("", text).rstrip().rstrip(".")


def tidy(message: object) -> str:
    """A message in printable characters, without error numbers and without the full stop after another library's.

    Example:
        >>> tidy("a/b cannot be written: [Errno 28] No space left on device. Free some.")
        'a/b cannot be written: No space left on device. Free some.'
        >>> tidy("Not loaded: turn offline mode on.. Without a network, see ../docs or a... b")
        'Not loaded: turn offline mode on. Without a network, see ../docs or a... b'
    """
    text = printable(message, 10_000)
    return re.sub(r"(?<=[\w)\]\"'])([.!?:;,])\.(?=\s|$)", r"\1", _ERRNO.sub("", text))


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings of this package as "lpt-peft: warning: ...", without file, line and source."""
    original = warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if filename.startswith(_PACKAGE) and issubclass(category, UserWarning):
            return f"lpt-peft: warning: {tidy(message)}\n"
        return original(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = original
