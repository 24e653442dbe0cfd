"""Time and memory, measured alike by the benchmarks of this folder. Not here: what is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)


def device_name(device: torch.device) -> str:
    """What a table calls the device: the card's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def seconds(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of one call, mean over `calls` in a row: by CUDA events on a GPU, else by the clock.

    The device is idle before the first call, and the last one has finished when this returns.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    torch.cuda.synchronize(device)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(calls):
        call()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3 / calls


def interleaved(
    actions: Mapping[K, Callable[[], object]], rounds: int, device: torch.device, calls: int = 1
) -> dict[K, list[float]]:
    """Seconds of every action in each of `rounds` rounds, after one to warm up; mean over `calls` calls in a row.

    A round goes through all of them, so that whatever else the machine does disturbs them alike.
    """
    samples: dict[K, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            sample = seconds(action, device, calls)
            if turn:
                samples[name].append(sample)
    return samples


def saved_bytes(run: Callable[[], Any], parameters: set[int]) -> int:
    """Bytes that autograd saves for backward, each storage once.

    Args:
        run: The forward pass; its result must hold the graph.
        parameters: `data_ptr` of the storages that do not count.
    """
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()
    del out
    return sum(saved.values())


def resident_bytes(*, peak: bool = False) -> int:
    """Resident memory of this process now, or the most it ever had (Linux).

    getrusage would count the peak of the process that started this one.
    """
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
