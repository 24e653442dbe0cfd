"""Defers SIGINT and SIGTERM until the current step finishes."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """Context manager: the first SIGINT or SIGTERM sets `requested`, the second raises KeyboardInterrupt.

    Python delivers signals to the main thread only; in other threads nothing changes.

    Args:
        watch: False changes nothing, for runs that cannot save.
    """

    def __init__(self, watch: bool = True) -> None:
        self.requested = False
        self._watch = watch
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if self._watch and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
