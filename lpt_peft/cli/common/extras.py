"""The error of a sub-command whose optional libraries are not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lpt_peft.errors import MissingExtraError


@contextmanager
def requires_extra(user: str, extra: str) -> Iterator[None]:
    """Turn a failed import into an error that names the extra to install.

    Args:
        user: Needs the library; the message begins with it: "lpt-peft train".
        extra: Installs the library: "train".

    Raises:
        MissingExtraError: A library is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(f'{user} needs {error.name}: pip install "lpt_peft[{extra}]".') from error
