"""The error for a sub-command whose optional libraries are not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lpt_peft.errors import MissingExtraError


@contextmanager
def extra_needed(user: str, extra: str) -> Iterator[None]:
    """Around imports: a library that is missing becomes a MissingExtraError that names the extra.

    Args:
        user: What needs the library, as the message begins: "lpt-peft train".
        extra: Name of the extra that installs it: "train".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(f'{user} needs {error.name}: pip install "lpt_peft[{extra}]".') from error
