"""The answers of a bank equal those of single adapters: mixed tasks, all kinds of batches, several ecosystems."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpt_peft import LongTailPromptAdapter, PromptBank
from lpt_peft.backbones import find_backbone
from tests.bank.tasks import deviation, fill, make_adapter, random_tasks, save
from tests.conftest import tiny_vit

TOLERANCE = 1e-12


def images_of(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_of(vit: nn.Module) -> Any:
    return find_backbone(copy.deepcopy(vit).double()).plain_feature


def in_float64(bank: PromptBank, adapters: dict[str, LongTailPromptAdapter]) -> None:
    bank.vit.double()
    for adapter in adapters.values():
        adapter.double()


@pytest.mark.parametrize("seed", range(3))
def test_32_random_tasks_in_one_batch(tmp_path: Path, seed: int) -> None:
    vit = tiny_vit(depth=4)
    plain, adapters = plain_of(vit), random_tasks(vit, tmp_path, 32, seed)
    bank = fill(PromptBank(vit), tmp_path, list(adapters))
    in_float64(bank, adapters)
    tasks: list[str | None] = [*adapters, None, None]
    random.Random(seed).shuffle(tasks)
    images = images_of(len(tasks), seed)
    output = bank(images, tasks)
    assert [result.task for result in output] == tasks
    assert deviation(output, images, adapters, plain) < TOLERANCE


KINDS: dict[str, dict[str, Any]] = {
    "shared": {"phase": "shared"},
    "final": {"phase": "group"},
    "block_k": {"phase": "group", "query": "block_k"},
    "short": {"phase": "group", "prompt_length": 1},
    "late": {"phase": "group", "shared_layers": 3, "query": "block_k"},
    "early": {"phase": "group", "shared_layers": 1, "top_k": 3},
    "from the first block": {"phase": "group", "shared_layers": 0},
}
SIZES: dict[str, Any] = {"prompt_length": 3, "pool_size": 4, "top_k": 2, "shared_layers": 2, "query": "final"}


@pytest.mark.parametrize(
    "kinds", [*([kind] for kind in KINDS), ["shared", "block_k"], ["final", "block_k"], list(KINDS)]
)
@pytest.mark.parametrize("present", ["alone", "among others", "with plain images"])
def test_every_kind_of_batch(tmp_path: Path, kinds: list[str], present: str) -> None:
    vit = tiny_vit(depth=4)
    plain = plain_of(vit)
    adapters = {kind: make_adapter(vit, number, **{**SIZES, **KINDS[kind]}) for number, kind in enumerate(KINDS)}
    for kind, adapter in adapters.items():
        save(adapter, tmp_path / kind)
    bank = fill(PromptBank(vit), tmp_path, list(KINDS) if present == "among others" else kinds)
    in_float64(bank, adapters)
    tasks: list[str | None] = [*kinds, *kinds, *([None] if present == "with plain images" else [])]
    images = images_of(len(tasks))
    assert deviation(bank(images, tasks), images, adapters, plain) < TOLERANCE


def test_the_plain_model_alone(tmp_path: Path) -> None:
    vit = tiny_vit(depth=4)
    plain, bank = plain_of(vit), PromptBank(vit)
    bank.vit.double()
    images = images_of(3)
    for _ in range(2):  # before and after there are tasks
        assert torch.equal(bank(images, None).features, plain(images))
        bank.vit.float()
        if not bank.tasks:
            bank.add("task", save(make_adapter(tiny_vit(depth=4), 0), tmp_path))
        bank.vit.double()


def test_answers_depend_on_the_task_of_the_image_alone(tmp_path: Path) -> None:
    """Also on what is in the other slots, and on what was in its slot before."""
    vit = tiny_vit(depth=4)
    adapters = random_tasks(vit, tmp_path, 6)
    bank = fill(PromptBank(vit, capacity=2), tmp_path, list(adapters))
    in_float64(bank, adapters)
    rng, images = random.Random(1), images_of(4)
    for _ in range(20):
        tasks = rng.choices(rng.sample(list(adapters), 2), k=4)
        assert deviation(bank(images, tasks), images, adapters, None) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_prompt_files_are_mixed_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    vit = tiny_vit(depth=4)
    adapters = {"wide": make_adapter(vit, 0), "narrow": make_adapter(vit, 1)}
    for module in (adapters["narrow"].shared, adapters["narrow"].pool, adapters["narrow"].head):
        module.to(dtype)
    bank = PromptBank(vit)
    for name in ("narrow", "wide"):  # the tables become wider
        bank.add(name, save(adapters[name], tmp_path / name))
    in_float64(bank, adapters)
    images = images_of(4)
    assert deviation(bank(images, ["wide", "narrow"] * 2), images, adapters, None) < TOLERANCE


def test_probabilities_follow_the_temperature_and_names_of_the_file(tmp_path: Path) -> None:
    vit = tiny_vit(depth=4)
    adapter = make_adapter(vit, 0, num_classes=3)
    adapter.metadata = replace(adapter.metadata, temperature=2.5, label_names=("ant", "bee", "cat"))
    bank = PromptBank(vit)
    bank.add("insects", save(adapter, tmp_path))
    output = bank(images_of(2).float(), "insects")
    for result in output.cpu()[:]:
        assert result.label_names == ("ant", "bee", "cat")
        assert torch.allclose(result.probabilities, (result.logits / 2.5).softmax(0))
    assert len(output) == 2
    assert output[-1].task == "insects"


def test_in_bfloat16_answers_are_close(tmp_path: Path) -> None:
    vit = tiny_vit(depth=4)
    adapter = make_adapter(vit, 0)
    bank = PromptBank(vit)
    bank.add("task", save(adapter, tmp_path))
    bank.cast_backbone(torch.bfloat16)
    assert {parameter.dtype for parameter in bank.vit.parameters()} == {torch.bfloat16}  # trainable or not
    adapter.cast_backbone(torch.bfloat16)
    images = images_of(4).float()
    with torch.no_grad():
        expected = adapter(images)
    assert torch.allclose(bank(images, "task").logits, expected, atol=0.5)
    bank.add("again", tmp_path)  # the fingerprint remains that of the original weights
