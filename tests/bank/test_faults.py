"""Errors in the middle of a change: the bank answers as before, and no slot is lost."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lpt_peft import PromptBank
from lpt_peft.checkpoint import WEIGHTS_NAME
from lpt_peft.errors import InputError, LPTError
from tests.bank.tasks import deviation, fill, free_slots, make_adapter, save, slots_of
from tests.checkpoint.test_hostile import CASES, valid
from tests.conftest import tiny_vit

NAMES = ["a", "b", "c"]


def images_of(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Any]:
    """Tasks saved in folders of their names; "c" is larger than the others."""
    found = {name: make_adapter(tiny_vit(), seed, prompt_length=2, pool_size=3) for seed, name in enumerate(NAMES)}
    found["c"] = make_adapter(tiny_vit(), 9, num_classes=30, prompt_length=3, pool_size=5)
    for name, adapter in found.items():
        save(adapter, tmp_path / name)
    return found


@pytest.fixture(scope="module")
def hostile_bank(tmp_path_factory: pytest.TempPathFactory) -> PromptBank:
    """A bank with a valid task, of the ViT of the hostile files."""
    folder = tmp_path_factory.mktemp("valid")
    (folder / WEIGHTS_NAME).write_bytes(valid())
    bank = PromptBank(tiny_vit(), capacity=2)
    bank.add("a", folder)
    return bank


def state(bank: PromptBank) -> Any:
    registry = bank._registry
    leases = [version.leases for version in registry._versions.values()]
    return bank.tasks, slots_of(bank), free_slots(bank), bank.memory(), leases, len(registry._waiting)


@pytest.mark.parametrize("part", ["SlotTables._empty", "SlotTables.write", "head_of", "_fill"])
@pytest.mark.parametrize("action", ["add", "replace", "evict"])
def test_memory_that_runs_out_loses_no_slot(
    adapters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, action: str
) -> None:
    bank = fill(PromptBank(tiny_vit(), capacity=2), tmp_path, ["a", "b"])
    if action == "evict":
        bank.add("c", tmp_path / "c")  # "a" leaves its slot
    before = state(bank)
    owner = "tables" if part != "head_of" else "registry"

    def run_out(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(f"lpt_peft.bank.{owner}.{part}", run_out)
        if action == "evict" and part == "SlotTables._empty":
            pytest.skip("the tables are large enough")
        with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
            {
                "add": lambda: bank.add("c", tmp_path / "c"),
                "replace": lambda: bank.replace("a", tmp_path / "c"),
                "evict": lambda: bank(images_of(1), "a"),
            }[action]()
    after = state(bank)
    assert after[0] == before[0]
    assert after[4:] == before[4:]
    taken = [slot for slot in slots_of(bank).values() if slot is not None]
    assert len(taken) + free_slots(bank) == 2
    if action == "evict":
        assert deviation(bank(images_of(2), ["a", "c"]), images_of(2), adapters, None) < 1e-4
        return
    images = images_of(2)
    assert deviation(bank(images, ["a", "b"]), images, adapters, None) < 1e-4
    bank.add("c", tmp_path / "c")
    assert deviation(bank(images, ["c", "b"]), images, adapters, None) < 1e-4
    for name in bank.tasks:
        bank.remove(name)
    assert free_slots(bank) == 2


@pytest.mark.parametrize(("forge", "error", "words"), CASES.values(), ids=CASES)
def test_hostile_files_change_nothing(
    tmp_path: Path, hostile_bank: PromptBank, forge: Any, error: Any, words: str
) -> None:
    bank, before = hostile_bank, state(hostile_bank)
    (tmp_path / WEIGHTS_NAME).write_bytes(forge())
    for change in (lambda: bank.add("x", tmp_path), lambda: bank.replace("a", tmp_path)):
        with pytest.raises(error, match=words):
            change()
        assert state(bank) == before


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_files_change_nothing(adapters: Any, tmp_path: Path, share: float) -> None:
    bank = fill(PromptBank(tiny_vit(), capacity=2), tmp_path, ["a", "b"])
    before = state(bank)
    content = (tmp_path / "c" / "prompts.safetensors").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "prompts.safetensors").write_bytes(content[: int(share * len(content))])
    for change in (lambda: bank.add("x", tmp_path / "cut"), lambda: bank.replace("a", tmp_path / "cut")):
        with pytest.raises(LPTError):
            change()
        assert state(bank) == before


def test_a_failing_forward_releases_its_tasks(adapters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = fill(PromptBank(tiny_vit(), capacity=2), tmp_path, ["a", "b"])
    before = state(bank)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bank.backbone, "pool", fail)
        with pytest.raises(KeyboardInterrupt):
            bank(images_of(2), ["a", "b"])
    assert state(bank) == before


def test_a_task_removed_while_its_batch_waits(adapters: Any, tmp_path: Path) -> None:
    """The waiting batch raises, and those behind it are answered."""
    bank = fill(PromptBank(tiny_vit(), capacity=2), tmp_path, NAMES)
    results: dict[str, Any] = {}

    def ask(name: str) -> None:
        try:
            results[name] = bank(images_of(1), name)
        except InputError as error:
            results[name] = str(error)

    with bank._registry.lease(["a", "b"]):
        first = threading.Thread(target=ask, args=("c",))
        first.start()
        while not bank._registry._waiting:
            pass
        second = threading.Thread(target=ask, args=("b",))
        second.start()
        bank.remove("c")
        first.join(30)
        second.join(30)
    assert "no task 'c'" in results["c"]
    assert deviation(results["b"], images_of(1), adapters, None) < 1e-4


def test_a_large_batch_does_not_starve(adapters: Any, tmp_path: Path) -> None:
    """Batches that never leave all slots free at once do not overtake a batch that needs all of them."""
    bank = fill(PromptBank(tiny_vit(), capacity=2), tmp_path, NAMES)
    answered: list[Any] = []
    stop = threading.Event()

    def ask_often() -> None:
        while not stop.is_set():
            bank(images_of(1), "c")

    threads = [threading.Thread(target=ask_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    large = threading.Thread(target=lambda: answered.append(bank(images_of(2), ["a", "b"])))
    large.start()
    large.join(30)
    alive = large.is_alive()
    stop.set()
    for thread in [*threads, large]:
        thread.join(30)
    assert not alive
    assert deviation(answered[0], images_of(2), adapters, None) < 1e-4
