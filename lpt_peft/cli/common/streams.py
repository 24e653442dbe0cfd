"""Standard output and standard error: encodings, narrow terminals, readers that have gone, JSON."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import sys
import textwrap
from codecs import lookup
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO, TextIOWrapper
from typing import Any, TextIO

from lpt_peft.cli.common.exit_codes import BROKEN_PIPE

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def replace_unprintable(*streams: TextIO) -> None:
    """Escape characters that the encoding of a stream lacks, such as class names in a terminal of another language."""
    for stream in streams:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def quiet_broken_pipe() -> Iterator[None]:
    """End quietly when the reader of the output has gone, as in `lpt-peft doctor --list | head`.

    Raises:
        SystemExit: With `exit_codes.BROKEN_PIPE`.
    """
    try:
        yield
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if _reader_has_gone(stream)]
        if not gone:
            raise  # of another pipe, such as that of a worker process
        for stream in gone:
            _discard(stream)
        raise SystemExit(BROKEN_PIPE) from None


def flush_output() -> None:
    """Write what standard output still holds, so that Python's own flush at exit cannot fail.

    Raises:
        OSError: The disk is full, or the reader has gone.
    """
    if sys.stdout is not None:  # as with `>&-`
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError:
            _discard(sys.stdout)
            raise


def wrap(text: str) -> str:
    """Wrap lines that are wider than the terminal, at spaces, so that it does not break their words."""
    width = shutil.get_terminal_size().columns
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if len(_ESCAPES.sub("", line)) > width:
            indent = " " * (len(line) - len(line.lstrip()) + 4) if line.startswith(" ") else ""
            parts = textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)
            lines[number] = "\n".join(parts)
    return "\n".join(lines)


def print_text(text: str) -> None:
    """Print text for people; on a terminal, wrapped."""
    print(wrap(text) if sys.stdout.isatty() else text)


@contextmanager
def wrapped_help() -> Iterator[None]:
    """Wrap the lines that tyro prints on standard output inside, such as the usage of a sub-command."""
    terminal, sys.stdout = sys.stdout, _Buffer(sys.stdout)
    try:
        yield
    finally:
        usage, _, rest = sys.stdout.getvalue().partition("\n")
        sys.stdout = terminal
        print(wrap(usage.replace(",", ", ")), rest and wrap(rest), sep="\n", end="")


class _Buffer(StringIO):
    """Text in memory that claims to be a terminal if `stream` is."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


def print_json(content: Any) -> None:
    """Print one JSON document that is valid in every encoding and does not control the terminal.

    Characters that cannot be printed, or that the encoding of standard output may lack, are written as JSON escapes.
    """
    print(dump_json(content, indent=2))


def dump_json(content: Any, indent: int | None = None) -> str:
    """The text that `print_json` prints; `indent` is that of `json.dumps`."""
    text = json.dumps(content, indent=indent, allow_nan=False, ensure_ascii=not _is_utf8(sys.stdout))
    return re.sub(r"[^\n]", lambda match: match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1], text)


def _is_utf8(stream: TextIO) -> bool:
    with suppress(LookupError):
        return lookup(getattr(stream, "encoding", None) or "ascii").name == "utf-8"
    return False


def _discard(stream: TextIO) -> None:
    """Send the rest of a stream nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _reader_has_gone(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows has no poll; a stream without a file has no reader
        return os.name == "nt"
