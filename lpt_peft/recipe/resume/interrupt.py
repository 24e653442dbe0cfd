"""Interruption: Ctrl-C and SIGTERM as a wish that is granted after the step under way, not in its middle."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """Inside the context, the first Ctrl-C (or SIGTERM) sets `asked`; the second one interrupts at once.

    Signals can be watched from the main thread alone; in any other one nothing is changed.

    Args:
        watch: False changes nothing: for runs that could not save.
    """

    def __init__(self, watch: bool = True) -> None:
        self.asked = False
        self._watch = watch
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if self._watch and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
