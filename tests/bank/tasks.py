"""Prompt files of random tasks that differ in everything, and the single adapters that answer them."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpt_peft import AdapterOutput, LongTailPromptAdapter, PromptBank
from lpt_peft.bank import BankOutput

DEPTH = 4


def random_sizes(rng: random.Random, depth: int = DEPTH) -> dict[str, Any]:
    """Sizes of a task, for `wrap`."""
    top_k = rng.randint(1, 3)
    return {
        "num_classes": rng.randint(1, 9),
        "prompt_length": rng.randint(1, 4),
        "pool_size": rng.randint(top_k, 6),
        "top_k": top_k,
        "shared_layers": rng.randint(1, depth - 1),
        "query": rng.choice(["final", "block_k"]),
        "logit_scale": rng.choice([5.0, 20.0]),
    }


def make_adapter(vit: nn.Module, seed: int, phase: str = "group", **sizes: Any) -> LongTailPromptAdapter:
    """An adapter with random prompts, on a copy of the ViT."""
    num_classes = sizes.pop("num_classes", 5)
    adapter = LongTailPromptAdapter.wrap(copy.deepcopy(vit), num_classes, **sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (adapter.shared, adapter.pool, adapter.head):
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapter.phase = phase
    return adapter.eval()


def save(adapter: LongTailPromptAdapter, folder: Path, **options: Any) -> Path:
    adapter.save_pretrained(folder, **options)
    return folder


def random_tasks(vit: nn.Module, folder: Path, count: int, seed: int = 0) -> dict[str, LongTailPromptAdapter]:
    """Tasks by name; the prompt file of a task is the folder of its name."""
    rng, adapters = random.Random(seed), {}
    for number in range(count):
        sizes = random_sizes(rng, len(vit.blocks))
        adapters[f"task{number}"] = make_adapter(vit, number, rng.choice(["shared", "group"]), **sizes)
        save(adapters[f"task{number}"], folder / f"task{number}")
    return adapters


def slots_of(bank: PromptBank) -> dict[str, int | None]:
    """Slot of each task; None while it is only in CPU memory."""
    return {name: version.slot for name, version in bank._registry._tasks.items()}


def free_slots(bank: PromptBank) -> int:
    return len(bank._registry._free)


def fill(bank: PromptBank, folder: Path, names: list[str]) -> PromptBank:
    for name in names:
        bank.add(name, folder / name)
    return bank


def deviation(output: BankOutput, images: Tensor, adapters: dict[str, LongTailPromptAdapter], plain: Any) -> float:
    """Largest difference of logits and features to those of single adapters; groups must be the same."""
    largest = 0.0
    with torch.no_grad():
        for row, result in enumerate(output):
            image = images[row : row + 1]
            if result.task is None:
                assert result.logits.shape == result.groups.shape == (0,)
                differences = [plain(image)[0] - result.features]
            else:
                single: AdapterOutput = adapters[result.task](image, return_output=True)
                assert torch.equal(single.groups[0], result.groups)
                assert result.logits.shape == single.logits[0].shape
                differences = [single.logits[0] - result.logits, single.features[0] - result.features]
            largest = max([largest, *(float(difference.abs().max()) for difference in differences)])
    return largest
