"""Capacity of a bank for many tasks: hit rate under Zipf requests, and the time to bring a task back to a slot.

    python examples/benchmarks/bank_capacity.py --figure docs/images/bank_capacity.png

Task i of N is requested with probability proportional to 1 / i^s, for each image of a batch independently. A hit is an
image whose task has a slot when the batch begins; for the others, the least recently used tasks leave their slots. A
short simulation computes the hit rates; before that, it is compared with the slots of the bank's registry after every
batch of a smaller run. "Pinned" is the hit rate if exactly the most frequent tasks have slots.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import tyro
from bank import Settings as BankSettings
from bank import random_content, written

from lpt_peft import PromptBank
from lpt_peft.bank.registry import Registry
from lpt_peft.bank.streams import StreamOrder
from lpt_peft.bank.tables import Sizes, SlotTables
from lpt_peft.checkpoint import PromptContent


@dataclass
class Settings:
    """Settings of the measurement."""

    model: str = "vit_base_patch16_224"
    """ViT of the prompt files whose copies are measured; random weights."""
    num_classes: int = 100
    tasks: int = 10_000
    batch_size: int = 32
    batches: int = 8_000
    """Batches of the simulation; the first quarter fills the slots and is not counted."""
    exponents: tuple[float, ...] = (0.8, 1.0, 1.2)
    capacities: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    rounds: int = 30
    """Repetitions of the measured times."""
    figure: Path | None = None
    json: Path | None = None


def zipf_requests(tasks: int, exponent: float, batches: int, batch_size: int, seed: int = 0) -> np.ndarray:
    """Requested tasks, (batches, batch_size); task 0 is the most frequent."""
    draws = np.random.default_rng(seed).random((batches, batch_size))
    return np.searchsorted(np.cumsum(zipf(tasks, exponent)), draws).clip(max=tasks - 1)


def zipf(tasks: int, exponent: float) -> np.ndarray:
    """Probabilities of the tasks, (tasks,)."""
    weights = np.arange(1, tasks + 1) ** -exponent
    return weights / weights.sum()


class Slots:
    """Tasks in the slots of a bank, the least recently used first.

    Args:
        capacity: Number of slots.
        tasks: Number of tasks; the last of them are in the slots, since they were added last.
    """

    def __init__(self, capacity: int, tasks: int) -> None:
        self.capacity = capacity
        self.tasks = OrderedDict.fromkeys(range(max(0, tasks - capacity), tasks))

    def request(self, batch: Sequence[int]) -> tuple[int, int]:
        """Serve a batch; returns the images whose task had a slot, and the tasks that had none."""
        distinct = dict.fromkeys(batch)
        missing = [task for task in distinct if task not in self.tasks]
        hits = sum(task in self.tasks for task in batch)
        for task in missing:
            if len(self.tasks) == self.capacity:
                del self.tasks[next(other for other in self.tasks if other not in distinct)]
            self.tasks[task] = None
        for task in distinct:
            self.tasks.move_to_end(task)
        return hits, len(missing)


def simulate(settings: Settings, exponent: float, capacity: int) -> dict[str, float]:
    """Hit rate, and swaps per batch, after the first quarter of the batches."""
    slots = Slots(capacity, settings.tasks)
    requests = zipf_requests(settings.tasks, exponent, settings.batches, settings.batch_size)
    results = np.array([slots.request(batch) for batch in requests.tolist()])[settings.batches // 4 :]
    return {
        "hit_rate": float(results[:, 0].mean() / settings.batch_size),
        "swaps": float(results[:, 1].mean()),
        "pinned": float(zipf(settings.tasks, exponent)[:capacity].sum()),
    }


class ObservedTables(SlotTables):
    """Tables of a bank on the CPU that record the task in each slot.

    Args:
        content: Prompt file of all tasks.
        capacity: Number of slots.
    """

    def __init__(self, content: PromptContent, capacity: int) -> None:
        self.order, self.content = StreamOrder(torch.device("cpu")), content
        self.tasks: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        reserved = Sizes(content.config.depth)
        super().__init__(capacity=capacity, dim=content.config.dim, order=self.order, reserved=reserved)

    def content_of(self, task: int) -> PromptContent:
        """A separate prompt file for a task, which shares the tensors."""
        content = replace(self.content)
        self._numbers[id(content)] = task
        return content

    def write(self, slot: int, content: PromptContent) -> None:
        """Write and record."""
        super().write(slot, content)
        self.tasks[slot] = self._numbers[id(content)]


def make_registry(content: PromptContent, capacity: int, tasks: int) -> tuple[Registry, ObservedTables]:
    """Registry of a bank with tasks "0", "1", ..., which share their tensors; and its tables."""
    tables = ObservedTables(content, capacity)
    registry = Registry(tables, capacity, tables.order)
    for task in range(tasks):
        registry.add(str(task), f"digest of {task}", tables.content_of(task), pinned=False)
    return registry, tables


def disagreements(registry: Registry, tables: ObservedTables, slots: Slots, requests: Iterable[Sequence[int]]) -> int:
    """Batches after which the tables have other tasks in their slots than the simulation."""
    different = 0
    for batch in requests:
        with registry.lease([str(task) for task in batch]):
            pass
        slots.request(batch)
        different += set(tables.tasks.values()) != set(slots.tasks)
    return different


def swap_times(settings: Settings, content: PromptContent, folder: Path, bank: PromptBank) -> dict[str, float]:
    """Median milliseconds of a swap from CPU memory to a slot, of adding a task from a file, and of a lease of hits."""
    registry, _ = make_registry(content, 1, 2)

    def lease(names: list[str], registry: Registry) -> None:
        with registry.lease(names):
            pass

    swaps = [timed(lambda name=str(number % 2): lease([name], registry)) for number in range(settings.rounds)]
    many, _ = make_registry(content, settings.batch_size, settings.tasks)
    last = [str(task) for task in range(settings.tasks - settings.batch_size, settings.tasks)]
    hits = [timed(lambda: lease(last, many)) for _ in range(settings.rounds)]
    loads = []
    for number in range(settings.rounds):
        written(folder, content, number)
        loads.append(timed(lambda: bank.add("task", folder)))
        bank.remove("task")
    return {"swap": statistics.median(swaps), "load": statistics.median(loads), "lease": statistics.median(hits)}


def timed(call: Any) -> float:
    """Milliseconds of a call."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def main(settings: Settings) -> dict[str, Any]:
    """Measure, simulate, print and draw."""
    vit = timm.create_model(settings.model, num_classes=0).eval()
    content = random_content(BankSettings(num_classes=settings.num_classes), vit)
    content = replace(content, tensors={name: tensor.half() for name, tensor in content.tensors.items()})
    small = Settings(tasks=400, batches=300)
    wrong = 0
    for capacity in (32, 100):
        requests = zipf_requests(small.tasks, 1.0, small.batches, small.batch_size).tolist()
        wrong += disagreements(*make_registry(content, capacity, small.tasks), Slots(capacity, small.tasks), requests)
    print(f"simulation and registry differ after {wrong} of {2 * small.batches} batches")
    with tempfile.TemporaryDirectory() as folder:
        bank = PromptBank(vit, capacity=1)
        times = swap_times(settings, content, Path(folder), bank)
        bank.add("task", written(Path(folder), content, 0))
        memory = bank.memory()
        nbytes = memory["slots"] / 2 + memory["heads"]  # the tables have another row, for the plain model
    print(
        f"{settings.model}, {settings.num_classes} classes, float16: {nbytes / 1e6:.2f} MB per slot; "
        f"CPU memory to a slot {times['swap']:.2f} ms, file to a slot {times['load']:.1f} ms; "
        f"lease of {settings.batch_size} tasks in slots, of {settings.tasks:,} tasks: {times['lease']:.2f} ms\n"
    )
    print(
        "| slots | memory | "
        + " | ".join(f"s = {exponent}: hits, swaps per batch" for exponent in settings.exponents)
        + " |"
    )
    print("|---|---|" + "---|" * len(settings.exponents))
    curves: dict[float, list[dict[str, float]]] = {exponent: [] for exponent in settings.exponents}
    for capacity in settings.capacities:
        cells = []
        for exponent, points in curves.items():
            points.append(simulate(settings, exponent, capacity))
            found = points[-1]
            cells.append(f"{found['hit_rate']:.1%} ({found['pinned']:.1%} pinned), {found['swaps']:.1f}")
        print(f"| {capacity:,} | {capacity * nbytes / 1e9:.2f} GB | " + " | ".join(cells) + " |", flush=True)
    report = {"differences": wrong, "bytes_per_slot": nbytes, "ms": times, "curves": curves}
    if settings.json is not None:
        settings.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    if settings.figure is not None:
        draw(settings, curves, settings.figure)
    return report


def draw(settings: Settings, curves: dict[float, list[dict[str, float]]], file: Path) -> None:
    """Draw hit rates over slots."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only for the figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, (exponent, points) in enumerate(curves.items()):
        for key, style in (("hit_rate", "o-"), ("pinned", "--")):
            label = f"s = {exponent}" if key == "hit_rate" else None
            values = [100 * point[key] for point in points]
            axes.plot(settings.capacities, values, style, color=f"C{number}", label=label, markersize=4, linewidth=1.4)
    axes.plot([], [], "--", color="grey", label="most frequent tasks pinned")
    axes.set_xscale("log", base=2)
    axes.set_xticks(settings.capacities, [f"{capacity:,}" for capacity in settings.capacities])
    axes.set(xlabel="slots", ylabel="images whose task has a slot, %", ylim=(0, 100))
    axes.set_title(f"{settings.tasks:,} tasks, requests by Zipf's law, batches of {settings.batch_size}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
