"""Measures a bank: a batch of many tasks against a batch of a single task, and the memory of many tasks.

Times are medians over interleaved rounds, on a CPU in CPU seconds of all threads, which other load distorts less than
wall-clock time. Ratios are medians over the rounds of the time of the single adapter, or of the bank with a single
task, divided by the time of the row, so that 1 is the same speed and less is slower.

    python examples/benchmarks/bank.py --model vit_small_patch16_224 --batch-size 32 --memory-tasks 0
    python examples/benchmarks/bank.py --model vit_base_patch16_224 --rounds 0 --memory-tasks 1000 --capacity 32
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from _measure import device_name, interleaved, resident_bytes
from torch import Tensor, nn

from lpt_peft import LongTailPromptAdapter, PromptBank
from lpt_peft.checkpoint import WEIGHTS_NAME, PromptContent, encode, read_prompt_file
from lpt_peft.config import Query

ADAPTER, ONE, MIXED, UNEQUAL = "adapter", "bank, one task", "bank, mixed tasks", "bank, mixed tasks of unequal length"


@dataclass
class Settings:
    """Settings of the benchmark."""

    model: str = "vit_small_patch16_224"
    batch_size: int = 32
    tasks: int = 32
    """Tasks in a mixed batch; those of unequal length have n and n / 2 prompt tokens."""
    num_classes: int = 100
    prompt_length: int = 10
    query: Query = "final"
    rounds: int = 9
    """Rounds of the measurement of speed; 0 leaves it out."""
    device: str = "cpu"
    compile: bool = False
    memory_tasks: int = 1000
    """Tasks of the measurement of memory; 0 leaves it out."""
    capacity: int = 32
    """Slots of that measurement."""
    tiny: bool = False
    """A ViT of two blocks on 32 px, for tests of this script."""
    json: Path | None = None
    """File for the numbers."""


def main(settings: Settings) -> dict[str, Any]:
    """Run both measurements and print them."""
    device = torch.device(settings.device)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2} if settings.tiny else {}
    vit = timm.create_model(settings.model, num_classes=0, **sizes).eval().to(device)
    with tempfile.TemporaryDirectory() as folder:
        report: dict[str, Any] = {"device": device_name(device), "settings": {**asdict(settings), "json": None}}
        report["speed"] = speed(settings, vit, Path(folder)) if settings.rounds else {}
        report["memory"] = memory(settings, vit, Path(folder)) if settings.memory_tasks else {}
    print(f"{settings.model} on {report['device']}, {settings.batch_size} images, {settings.tasks} tasks")
    for name, row in report["speed"].items():
        print(
            f"{name:38} {row['ms']:9.1f} ms   speed: {row['of_adapter']:.3f} of the adapter, {row['of_one']:.3f} of one"
        )
    for name, value in report["memory"].items():
        print(f"{name:38} {value:14,.0f} bytes")
    if settings.json is not None:
        settings.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return report


def speed(settings: Settings, vit: nn.Module, folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds of a batch, and speed relative to the adapter and to the bank with one task."""
    content = random_content(settings, vit)
    short = random_content(replace(settings, prompt_length=max(1, settings.prompt_length // 2)), vit)
    bank = PromptBank(copy.deepcopy(vit), capacity=settings.tasks)
    shorter = PromptBank(copy.deepcopy(vit), capacity=settings.tasks)
    names = [f"task{number}" for number in range(settings.tasks)]
    for number, name in enumerate(names):
        bank.add(name, written(folder / name, content, number))
        shorter.add(name, folder / name if number % 2 else written(folder / f"short{number}", short, number))
    adapter = LongTailPromptAdapter.from_pretrained(folder / names[0], copy.deepcopy(vit))
    images = torch.randn(settings.batch_size, *bank.backbone.preprocess()["input_size"]).to(settings.device)
    tasks = [names[row % settings.tasks] for row in range(settings.batch_size)]
    forward: Callable[[Tensor], Tensor] = adapter
    if settings.compile:
        forward = torch.compile(adapter, fullgraph=True)
        bank.compile()
        shorter.compile()
    actions: dict[str, Callable[[], object]] = {
        ADAPTER: lambda: forward(images),
        ONE: lambda: bank(images, names[0]),
        MIXED: lambda: bank(images, tasks),
        UNEQUAL: lambda: shorter(images, tasks),
    }
    with torch.no_grad():
        samples = interleaved(actions, settings.rounds, torch.device(settings.device), clock=time.process_time)
    return {
        name: {
            "ms": 1000 * statistics.median(times),
            "of_adapter": median_ratio(samples[ADAPTER], times),
            "of_one": median_ratio(samples[ONE], times),
        }
        for name, times in samples.items()
    }


def memory(settings: Settings, vit: nn.Module, folder: Path) -> dict[str, float]:
    """Bytes of many tasks in a bank: slots, prompt files in CPU memory, and the growth of this process."""
    content = random_content(settings, vit)
    content = replace(content, tensors={name: tensor.half() for name, tensor in content.tensors.items()})
    bank = PromptBank(copy.deepcopy(vit), capacity=settings.capacity)
    before = resident_bytes()
    for number in range(settings.memory_tasks):
        bank.add(f"task{number}", written(folder / "task", content, number))
        if (number + 1) % 200 == 0:
            print(f"{number + 1} tasks added")
    found = bank.memory()
    return {
        "a task, float16 (prompts and head)": found["files"] / settings.memory_tasks,
        f"{settings.memory_tasks} prompt files in CPU memory": found["files"],
        f"{settings.capacity} slots": found["slots"],
        "classifiers of the tasks in slots": found["heads"],
        "growth of the process": resident_bytes() - before,
        "growth of the process at its peak": resident_bytes(peak=True) - before,
    }


def random_content(settings: Settings, vit: nn.Module) -> PromptContent:
    """Content of a prompt file in phase "group" with random prompts."""
    adapter = LongTailPromptAdapter.wrap(
        copy.deepcopy(vit), settings.num_classes, prompt_length=settings.prompt_length, query=settings.query
    )
    adapter.phase = "group"
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        content = read_prompt_file(folder)
    return replace(content, tensors={name: content.tensors[name] for name in content.config.tensor_shapes})


def written(folder: Path, content: PromptContent, number: int) -> Path:
    """Write a prompt file that differs from those of other numbers; returns its folder."""
    head = content.tensors["head.weight"].roll(number, 0)
    head = head + torch.full_like(head, number / 1000)
    folder.mkdir(exist_ok=True)
    encoded = encode(replace(content, tensors={**content.tensors, "head.weight": head}))
    (folder / WEIGHTS_NAME).write_bytes(encoded.weights)
    return folder


def median_ratio(base: list[float], times: list[float]) -> float:
    """Median over the rounds of base / times."""
    return statistics.median(first / second for first, second in zip(base, times, strict=True))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
