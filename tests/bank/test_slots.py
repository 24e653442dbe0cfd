"""Slots, versions and names: eviction, pinning, replacing, errors that change nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lpt_peft import LongTailPromptAdapter, PromptBank
from lpt_peft._prompt_content import content_of
from lpt_peft.checkpoint import WEIGHTS_NAME, encode
from lpt_peft.errors import (
    BackboneError,
    BackboneMismatchError,
    ConfigError,
    InputError,
    PromptFileIntegrityError,
    PromptFileNotFoundError,
    StateError,
)
from tests.bank.tasks import deviation, fill, free_slots, make_adapter, save, slots_of
from tests.conftest import tiny_vit

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, LongTailPromptAdapter]:
    """Four tasks, saved in folders of their names."""
    found = {name: make_adapter(tiny_vit(), seed, prompt_length=2, pool_size=3) for seed, name in enumerate(NAMES)}
    for name, adapter in found.items():
        save(adapter, tmp_path / name)
    return found


def images_of(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def bank_of(folder: Path, names: list[str], **options: Any) -> PromptBank:
    return fill(PromptBank(tiny_vit(), **options), folder, names)


def resident(bank: PromptBank) -> set[str]:
    return {name for name, slot in slots_of(bank).items() if slot is not None}


def test_the_least_recently_used_task_is_evicted(adapters: Any, tmp_path: Path) -> None:
    bank = bank_of(tmp_path, ["a", "b"], capacity=2)
    bank(images_of(1), "a")
    bank.add("c", tmp_path / "c")
    assert resident(bank) == {"a", "c"}
    assert bank.tasks == ("a", "b", "c")
    assert deviation(bank(images_of(2), ["b", "c"]), images_of(2), adapters, None) < 1e-4
    assert resident(bank) == {"b", "c"}


def test_a_pinned_task_is_never_evicted(adapters: Any, tmp_path: Path) -> None:
    bank = bank_of(tmp_path, [], capacity=2)
    bank.add("a", tmp_path / "a", pinned=True)
    for name in ("b", "c", "d", "b", "c"):
        if name not in bank.tasks:
            bank.add(name, tmp_path / name)
        assert deviation(bank(images_of(1), name), images_of(1), adapters, None) < 1e-4
        assert "a" in resident(bank)
    bank.replace("a", tmp_path / "d")  # still pinned
    bank(images_of(1), "b")
    bank(images_of(1), "c")
    assert slots_of(bank)["a"] is not None
    bank.remove("a")
    bank.add("a", tmp_path / "a")  # not pinned any more
    bank(images_of(2), ["b", "c"])
    assert slots_of(bank)["a"] is None


def test_pinned_tasks_leave_a_slot(adapters: Any, tmp_path: Path) -> None:
    bank = bank_of(tmp_path, [], capacity=1)
    bank.add("a", tmp_path / "a", pinned=True)
    with pytest.raises(StateError, match="All 1 slots.*'b' could never be used"):
        bank.add("b", tmp_path / "b")
    assert bank.tasks == ("a",)
    bank.replace("a", tmp_path / "b")  # with one slot: the old version leaves it
    assert deviation(bank(images_of(1), "a"), images_of(1), {"a": adapters["b"]}, None) < 1e-4
    bank.add("same", tmp_path / "b")  # the same prompts share the slot
    with pytest.raises(StateError, match="All 1 slots"):
        bank.replace("same", tmp_path / "c")
    assert deviation(bank(images_of(1), "same"), images_of(1), {"same": adapters["b"]}, None) < 1e-4


def test_equal_prompt_files_share_a_slot(adapters: Any, tmp_path: Path) -> None:
    bank = bank_of(tmp_path, ["a"], capacity=4)
    bank.add("copy", tmp_path / "a")
    assert slots_of(bank)["a"] == slots_of(bank)["copy"]
    bank.replace("a", tmp_path / "b")
    assert slots_of(bank)["a"] != slots_of(bank)["copy"]
    answers = {"a": adapters["b"], "copy": adapters["a"]}
    assert deviation(bank(images_of(2), ["a", "copy"]), images_of(2), answers, None) < 1e-4
    for name in ("a", "copy"):
        bank.remove(name)
    assert free_slots(bank) == 4
    assert bank.memory()["files"] == 0


def test_a_version_in_use_keeps_its_slot(adapters: Any, tmp_path: Path) -> None:
    bank = bank_of(tmp_path, ["a", "b"], capacity=3)
    with bank._registry.lease(["a"]) as leased:
        slot = leased.slots[0]
        before = [table[slot].clone() for table in leased.tables]
        bank.replace("a", tmp_path / "c")
        bank.remove("b")
        for name in ("b", "d"):
            bank.add(name, tmp_path / name)
        assert slot not in slots_of(bank).values()
        assert free_slots(bank) == 0
        assert all(torch.equal(table[slot], old) for table, old in zip(leased.tables, before, strict=True))
        # A larger task gives new tables; those of the batch stay.
        bank.remove("d")
        save(make_adapter(tiny_vit(), 9, num_classes=30, pool_size=5, top_k=4), tmp_path / "large")
        bank.add("large", tmp_path / "large")
        assert all(torch.equal(table[slot], old) for table, old in zip(leased.tables, before, strict=True))
    assert free_slots(bank) == 1
    bank.remove("large")
    assert deviation(bank(images_of(2), ["a", "b"]), images_of(2), {**adapters, "a": adapters["c"]}, None) < 1e-4
    assert free_slots(bank) == 1


def test_a_batch_of_too_many_tasks_is_refused(adapters: Any, tmp_path: Path) -> None:
    bank = bank_of(tmp_path, ["a", "b", "c"], capacity=2)
    with pytest.raises(InputError, match="3 tasks, and the bank has 2 slots.*Split the batch"):
        bank(images_of(3), ["a", "b", "c"])
    assert len(bank(images_of(4), ["a", "b", None, "a"])) == 4
    bank.remove("c")
    bank.add("c", tmp_path / "c", pinned=True)
    with pytest.raises(InputError, match="2 tasks, and the bank has 2 slots, of which 1 hold"):
        bank(images_of(2), ["a", "b"])


def test_unknown_names_raise_before_anything_runs(adapters: Any, tmp_path: Path, monkeypatch: Any) -> None:
    bank = bank_of(tmp_path, ["a"])
    monkeypatch.setattr(bank, "_runner", None)
    with pytest.raises(InputError, match=re.escape("no task 'z' (it has 1: 'a')")):
        bank(images_of(2), ["a", "z"])
    with pytest.raises(InputError, match="no task 'z'"):
        bank.remove("z")
    with pytest.raises(InputError, match="no task 'z'"):
        bank.replace("z", "/nowhere")
    with pytest.raises(InputError, match="already has a task 'a'.*replace"):
        bank.add("a", tmp_path / "b")
    assert all(version.leases == 0 for version in bank._registry._versions.values())


@pytest.mark.parametrize(
    ("images", "tasks", "message"),
    [
        (torch.zeros(2, 3, 32, 32), ["a"], "tasks has 1 names and the batch 2 images"),
        (torch.zeros(0, 3, 32, 32), [], "no images"),
        (torch.zeros(1, 3, 32, 32), [3], "must be names of tasks or None.*3"),
        ("photo.jpg", ["a"], r"must be a tensor \(B, 3, H, W\), not str"),
        (torch.zeros(1, 3, 40, 32), ["a"], "32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a"], "uint8"),
    ],
)
def test_bad_batches(adapters: Any, tmp_path: Path, images: Any, tasks: Any, message: str) -> None:
    bank = bank_of(tmp_path, ["a"])
    with pytest.raises(InputError, match=message):
        bank(images, tasks)
    assert len(bank(images_of(1), "a")) == 1
    assert all(version.leases == 0 for version in bank._registry._versions.values())


def test_refused_files_change_nothing(adapters: Any, tmp_path: Path) -> None:
    bank = bank_of(tmp_path, ["a"])
    other = make_adapter(tiny_vit(num_heads=3), 0)
    weights = tiny_vit()
    with torch.no_grad():
        weights.blocks[0].mlp.fc1.weight[0, 0] += 1
    shallow = LongTailPromptAdapter.wrap(tiny_vit(), 3, placement="shallow")
    damaged = bytearray((tmp_path / "b" / "prompts.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "prompts.safetensors").write_bytes(damaged)
    refused = {
        tmp_path / "missing": PromptFileNotFoundError,
        tmp_path / "damaged": PromptFileIntegrityError,
        save(other, tmp_path / "heads"): BackboneMismatchError,
        save(make_adapter(weights, 0), tmp_path / "weights"): BackboneMismatchError,
        save(shallow, tmp_path / "shallow"): ConfigError,
    }
    loose = bank_of(tmp_path, ["a"], check_backbone="warn")
    with pytest.warns(UserWarning, match="other weights"):
        loose.add("b", tmp_path / "weights")
    wide = save(make_adapter(tiny_vit(depth=3), 0), tmp_path / "deep")
    deeper = pytest.raises(BackboneMismatchError, match="width 24, 3 blocks.*has 24, 2")
    with pytest.warns(UserWarning, match="another architecture"), deeper:
        loose.add("c", wide)
    with pytest.raises(ConfigError, match="check_backbone"):
        bank_of(tmp_path, [], check_backbone="maybe")
    before = slots_of(bank), bank.memory()
    for folder, error in refused.items():
        with pytest.raises(error):
            bank.add("b", folder)
        with pytest.raises(error):
            bank.replace("a", folder)
        assert (slots_of(bank), bank.memory()) == before
    assert deviation(bank(images_of(1), "a"), images_of(1), adapters, None) < 1e-4
    with pytest.raises(InputError, match="name=''"):
        bank.add("", tmp_path / "b")


@pytest.mark.parametrize(
    ("keyword", "limit", "found"),
    [
        ("max_prompt_length", 1, "prompt_length=2"),
        ("max_pool_size", 2, "pool_size=3"),
        ("max_top_k", 1, "top_k=2"),
        ("max_classes", 4, "num_classes=5"),
    ],
)
def test_limits_refuse_larger_tasks(adapters: Any, tmp_path: Path, keyword: str, limit: int, found: str) -> None:
    bank = bank_of(tmp_path, [], **{keyword: limit})
    with pytest.raises(ConfigError, match=f"{found}.*created with {keyword}={limit}"):
        bank.add("a", tmp_path / "a")
    bank = bank_of(tmp_path, ["a"], **{keyword: limit + 1})
    assert deviation(bank(images_of(1), "a"), images_of(1), adapters, None) < 1e-4
    with pytest.raises(ConfigError, match=f"{keyword}=0"):
        PromptBank(tiny_vit(), **{keyword: 0})


def test_unwrap_and_wrong_models(adapters: Any, tmp_path: Path) -> None:
    vit, plain = tiny_vit(), tiny_vit()
    classes = [type(module) for module in vit.modules()]
    bank = fill(PromptBank(vit), tmp_path, ["a"])
    assert torch.equal(vit(images_of(2)), plain(images_of(2)))
    with pytest.raises(BackboneError, match="already takes prompts"):
        PromptBank(vit)
    assert bank.unwrap() is vit
    assert [type(module) for module in vit.modules()] == classes
    for call in (lambda: bank(images_of(1), "a"), lambda: bank.add("b", tmp_path / "b"), bank.unwrap):
        with pytest.raises(StateError, match="was unwrapped"):
            call()
    with pytest.raises(BackboneError, match="meta device"):
        PromptBank(tiny_vit().to("meta"))
    with pytest.raises(ConfigError, match="capacity=0"):
        PromptBank(tiny_vit(), capacity=0)
    moved = PromptBank(tiny_vit())
    moved.vit.to("meta")
    with pytest.raises(StateError, match="moved to meta"):
        moved(images_of(1), None)


@pytest.mark.slow
def test_memory_of_1000_tasks(tmp_path: Path) -> None:
    """Slots take what the sizes say, whatever the number of tasks."""
    config = {"num_classes": 3, "prompt_length": 1, "pool_size": 2, "top_k": 1}
    adapter = make_adapter(tiny_vit(), 0, **config)
    content = content_of(adapter)
    bank = PromptBank(tiny_vit(), capacity=8)
    for number in range(1000):
        tensors = {**content.tensors, "head.weight": content.tensors["head.weight"] + number}
        # Without the waits for the disk of save_pretrained.
        (tmp_path / WEIGHTS_NAME).write_bytes(encode(replace(content, tensors=tensors)).weights)
        bank.add(str(number), tmp_path)
    found, size = bank.memory(), content.config
    head = size.num_classes * size.feature_dim
    trained = [tensor for tensor in adapter.adapter_state_dict().values() if tensor.is_floating_point()]
    prompts = sum(map(torch.numel, trained)) - head
    assert found["slots"] == 9 * (4 * prompts + 8 * 5)  # with the numbers of each row
    assert found["heads"] == 8 * (4 * head + 8 * size.num_classes)  # with the norms
    assert 4000 * (prompts + head) <= found["files"] <= 4000 * (prompts + head) + 1000 * 8 * 2  # with the usage counts
    assert len(bank.tasks) == 1000
    assert len(resident(bank)) == 8
    tasks = [str(number) for number in (0, 999, 17)]
    assert len(bank(images_of(3), tasks)) == 3
