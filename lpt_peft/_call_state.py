"""State of a call on this thread: the prompt of the block that runs, and the recorder of calls.

Not here: the blocks and attentions that use it (`_prompted.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Recorder = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


class CapturedPrompt:
    """The prompt of one call of a block: `normed` (1 or B, n, d) for each of its attentions; `mask` (B, n) or None."""

    def __init__(self, block: nn.Module, sites: int) -> None:
        self.block = block
        self.sites = sites
        self.normed: list[tuple[nn.Module, Tensor]] = []
        self.capturing = True
        self.length = 0
        self.mask = call_state.mask


class _CallState(threading.local):
    """The prompt that a block on this thread passes to its attentions, and the active recorder of calls.

    `carried` is the number of prompt tokens at the end of the tokens of the block, which its arguments do not cover.
    `mask` (B, n) is False for tokens of the next block's prompt that are padding.
    """

    def __init__(self) -> None:
        # Runs in each thread. Class attributes as defaults would compile a graph again in a thread's first call.
        self.prompt: CapturedPrompt | None = None
        self.carried = 0
        self.mask: Tensor | None = None
        self.recording: tuple[Sequence[nn.Module], Recorder] | None = None


call_state = _CallState()


@contextmanager
def recording(modules: Sequence[nn.Module], recorder: Recorder) -> Iterator[None]:
    """Replace calls of the blocks among `modules` by `recorder(tokens, args, kwargs)`, on this thread.

    Classifiers among them that were given to `pass_through` return their input.
    """
    outer, call_state.recording = call_state.recording, (modules, recorder)
    try:
        yield
    finally:
        call_state.recording = outer


def recorder_of(module: nn.Module) -> Recorder | None:
    """Return the recorder of this module's calls; a module that a hook runs in the meantime has none."""
    if (active := call_state.recording) is None:
        return None
    modules, recorder = active
    return recorder if any(recorded is module for recorded in modules) else None
