"""What Ctrl-C says in commands that go on where they were broken off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def telling_how_to_go_on() -> Iterator[None]:
    """Inside, an interruption gets a message that says how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        again = "The same command goes on from the last checkpoint there."
        raise KeyboardInterrupt(f"{stop}. {again}" if str(stop) else again) from stop
