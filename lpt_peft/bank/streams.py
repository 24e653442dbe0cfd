"""Order between streams of an accelerator: a slot is not written while a kernel reads it, and not read too early.

A batch returns before its kernels have run. Threads that use other streams therefore wait for events of a slot's
last readers and of its last writer. On the CPU there is nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StreamOrder:
    """Events of the slots' readers and writers.

    Args:
        device: Device of the tables.

    Attributes:
        device: The same.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = device.type == "cuda"
        self._written: dict[int, torch.cuda.Event] = {}
        self._read: dict[int, list[torch.cuda.Event]] = {}

    def before_writing(self, slot: int) -> None:
        """Let the current stream wait for all readers of a slot."""
        for event in self._read.pop(slot, []):
            torch.cuda.current_stream(self.device).wait_event(event)

    def after_writing(self, slot: int) -> None:
        """Remember the end of the writing."""
        if self._streams:
            self._written[slot] = self._record()

    def before_reading(self, slots: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Let the current stream wait until slots are written, and keep tensors in memory until it has read them."""
        if self._streams:
            stream = torch.cuda.current_stream(self.device)
            for slot in slots:
                stream.wait_event(self._written[slot])
            for tensor in tensors:
                tensor.record_stream(stream)

    def after_reading(self, slots: Sequence[int]) -> None:
        """Remember the end of a batch that reads slots."""
        if self._streams and slots:
            event = self._record()
            for slot in slots:
                # Events that have passed need no waiting; without this the list of a popular slot would grow.
                kept = [earlier for earlier in self._read.get(slot, []) if not earlier.query()]
                self._read[slot] = [*kept, event]

    def synchronize(self) -> None:
        """Wait for all kernels of the device, before tables are copied."""
        if self._streams:
            torch.cuda.synchronize(self.device)

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event
