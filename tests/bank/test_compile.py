"""One graph for all tasks: a compiled bank answers alike, and adding and removing tasks compiles nothing."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from lpt_peft import PromptBank
from tests.bank.tasks import deviation, fill, make_adapter, random_tasks, save
from tests.conftest import tiny_vit

RESERVED = {"max_prompt_length": 4, "max_pool_size": 6, "max_top_k": 3, "max_group_layers": 3}


def images_of(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_answers_equal_single_adapters(tmp_path: Path, backend: str) -> None:
    counters.clear()
    vit = tiny_vit(depth=4)
    adapters = random_tasks(vit, tmp_path, 32)
    bank = fill(PromptBank(vit), tmp_path, list(adapters))
    for model in (bank.vit, *adapters.values()):
        model.double()
    bank.compile(backend=backend)
    images, tasks = images_of(32), list(adapters)
    random.Random(0).shuffle(tasks)
    assert deviation(bank(images, tasks), images, adapters, None) < 1e-12
    assert graphs() == 1


def test_threads_share_a_compiled_bank(tmp_path: Path) -> None:
    """A new thread neither fails nor compiles again."""
    counters.clear()
    vit = tiny_vit()
    adapters = random_tasks(vit, tmp_path, 4)
    bank = fill(PromptBank(vit), tmp_path, list(adapters))
    for model in (bank.vit, *adapters.values()):
        model.double()
    bank.compile(backend="aot_eager")
    images = images_of(4)

    def ask(number: int) -> float:
        tasks = random.Random(number).sample(list(adapters), 4)
        return deviation(bank(images, tasks), images, adapters, None)

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(ask, range(12))) < 1e-12
    assert graphs() == 1


def test_adding_replacing_and_removing_compiles_nothing(tmp_path: Path) -> None:
    counters.clear()
    vit = tiny_vit(depth=4)
    adapters = random_tasks(vit, tmp_path, 12)
    names = list(adapters)
    bank = fill(PromptBank(vit, capacity=6, **RESERVED), tmp_path, names[:6])
    bank.compile(backend="aot_eager")
    images = images_of(6, torch.float32)
    bank(images, names[:6])
    assert graphs() == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for new in names[6:]:
            bank.add(new, tmp_path / new)
            bank.replace(names[0], tmp_path / new)
            tasks = [names[0], new, names[1], names[2], names[3], names[4]]
            changed = {**adapters, names[0]: adapters[new]}
            assert deviation(bank(images, tasks), images, changed, None) < 1e-4
            bank.remove(new)
    assert graphs() == 1


def test_a_graph_for_each_kind_of_batch(tmp_path: Path) -> None:
    counters.clear()
    vit = tiny_vit()
    kinds: dict[str, dict[str, Any]] = {
        "shared": {"phase": "shared", "query": "final"},
        "final": {"query": "final"},
        "block_k": {"query": "block_k"},
    }
    sizes = {"prompt_length": 2, "pool_size": 3, "top_k": 2, "shared_layers": 1}
    adapters = {
        kind: make_adapter(vit, seed, **{**sizes, **options}) for seed, (kind, options) in enumerate(kinds.items())
    }
    bank = PromptBank(vit)
    for kind, adapter in adapters.items():
        bank.add(kind, save(adapter, tmp_path / kind))
    bank.compile(backend="eager")
    images = images_of(4, torch.float32)
    batches: list[list[str | None]] = [["shared"] * 4, ["final"] * 4, ["block_k"] * 4, ["shared", "final"] * 2]
    batches += [["final", "block_k"] * 2, [None] * 4, [None, "final"] * 2]
    found = []
    for batch in batches:
        assert deviation(bank(images, batch), images, adapters, bank.backbone.plain_feature) < 1e-4
        found.append(graphs())
    assert found == [1, 2, 3, 3, 4, 5, 6]
    # More graphs than torch allows for a function: each kind of batch has its own, other sizes share a dynamic graph.
    for size in (3, 5, 6):
        for batch in batches:
            more = images_of(size, torch.float32)
            assert deviation(bank(more, (batch * 2)[:size]), more, adapters, bank.backbone.plain_feature) < 1e-4
    assert graphs() == 12


def test_larger_tasks_compile_again_with_static_sizes(tmp_path: Path) -> None:
    counters.clear()
    vit = tiny_vit()
    adapters = {str(length): make_adapter(vit, length, prompt_length=length) for length in (2, 3, 5)}
    bank = PromptBank(vit)
    bank.compile(backend="eager")
    images = images_of(4, torch.float32)
    for count, (name, adapter) in enumerate(adapters.items(), 1):
        bank.add(name, save(adapter, tmp_path / name))
        assert deviation(bank(images, name), images, adapters, None) < 1e-4
        assert graphs() == count
