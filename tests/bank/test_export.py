"""A bank as a module: exported and traced programs answer as single adapters do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lpt_peft import PromptBank
from lpt_peft.bank import BankModule
from lpt_peft.errors import InputError
from tests.bank.tasks import fill, make_adapter, random_tasks, save
from tests.conftest import tiny_vit


def images_of(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def check(answers: Any, images: Tensor, task: Tensor, adapters: list[Any]) -> None:
    logits, features, groups = answers
    for row, index in enumerate(task.tolist()):
        with torch.no_grad():
            single = adapters[index](images[row : row + 1], return_output=True)
        classes, top_k = single.logits.shape[1], single.groups.shape[1]
        assert (logits[row, :classes] - single.logits[0]).abs().max() < 1e-12
        assert torch.equal(logits[row, classes:], torch.full_like(logits[row, classes:], -torch.inf))
        assert (features[row] - single.features[0]).abs().max() < 1e-12
        assert torch.equal(groups[row, :top_k], single.groups[0])


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.nightly])])
def test_an_exported_bank_of_32_tasks_equals_single_adapters(tmp_path: Path, strict: bool) -> None:
    vit = tiny_vit(depth=4)
    adapters = random_tasks(vit, tmp_path, 32)
    bank = fill(PromptBank(vit), tmp_path, list(adapters))
    for model in (bank.vit, *adapters.values()):
        model.double()
    names = list(adapters)
    random.Random(0).shuffle(names)
    module = bank.export_module(names)
    batch = torch.export.Dim("batch", min=2, max=256)
    dynamic = {"images": {0: batch}, "task": {0: batch}}
    example = (images_of(2), torch.tensor([0, 1]))
    program = torch.export.export(module, example, dynamic_shapes=dynamic, strict=strict)
    torch.export.save(program, tmp_path / "bank.pt2")
    for name in names:  # the program has copies
        bank.remove(name)
    bank.unwrap()
    loaded = torch.export.load(tmp_path / "bank.pt2").module()
    images, task = images_of(32), torch.tensor(random.Random(1).sample(range(32), 32))
    check(loaded(images, task), images, task, [adapters[name] for name in names])


def test_a_module_has_the_tasks_of_its_creation(tmp_path: Path) -> None:
    adapters = [make_adapter(tiny_vit(), seed, num_classes=3 + seed, prompt_length=1 + seed) for seed in range(3)]
    for seed, adapter in enumerate(adapters):
        save(adapter, tmp_path / str(seed))
    bank = fill(PromptBank(tiny_vit(), capacity=2), tmp_path, ["0", "1", "2"])
    module = bank.export_module(["2", "0"])
    assert isinstance(module, BankModule)
    bank.replace("2", tmp_path / "1")
    bank(images_of(1).float(), "1")
    for model in (bank.vit, *adapters):
        model.double()
    images, task = images_of(4), torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        check(module(images, task), images, task, [adapters[2], adapters[0]])
    with pytest.raises(InputError, match="list of at least 1 name"):
        bank.export_module([])
    with pytest.raises(InputError, match="'0' must be a list"):
        bank.export_module("0")
    with pytest.raises(InputError, match="no task 'z'"):
        bank.export_module(["0", "z"])
