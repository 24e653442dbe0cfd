"""Helpers that measure time and memory for the benchmarks in this folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)


def device_name(device: torch.device) -> str:
    """Return the name of the device for a table: the name of the card, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def seconds(
    call: Callable[[], object],
    device: torch.device,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Measure the seconds of a call, mean over `calls` calls: by CUDA events on a GPU, else by `clock`.

    Waits until the device is idle before the first call and after the last.
    """
    if device.type != "cuda":
        start = clock()
        for _ in range(calls):
            call()
        return (clock() - start) / calls
    torch.cuda.synchronize(device)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(calls):
        call()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3 / calls


def interleaved(
    actions: Mapping[K, Callable[[], object]],
    rounds: int,
    device: torch.device,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[K, list[float]]:
    """Measure the seconds of every action in each of `rounds` rounds after a warm-up round; mean over `calls` calls.

    Each round runs all actions, so that other load on the machine affects them equally.
    """
    samples: dict[K, list[float]] = {name: [] for name in actions}
    for round_index in range(rounds + 1):
        for name, action in actions.items():
            sample = seconds(action, device, calls, clock)
            if round_index > 0:
                samples[name].append(sample)
    return samples


def saved_bytes(run: Callable[[], Any], parameters: set[int]) -> int:
    """Count the bytes that autograd saves for backward, each storage once.

    Args:
        run: The forward pass; its result must keep the graph alive.
        parameters: `data_ptr` of the storages to exclude.
    """
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        out = run()
    del out
    return sum(saved.values())


def resident_bytes(*, peak: bool = False) -> int:
    """Return the current or the peak resident memory of this process (Linux).

    `getrusage` would include the peak of the parent process.
    """
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
