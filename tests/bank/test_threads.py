"""Adding, replacing, removing and asking at random: never another task's answer, never a stale version, no lost slot.

The answers of the prompt files are known from single adapters, so that calls may come in any order.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from lpt_peft import PromptBank
from lpt_peft.errors import InputError
from tests.bank.tasks import free_slots, make_adapter, save, slots_of
from tests.conftest import tiny_vit

FILES, NAMES, CAPACITY = 6, ["a", "b", "c", "d", "e"], 3
IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@cache
def prompt_files() -> tuple[tuple[Path, Tensor], ...]:
    """Folder of each prompt file, and its logits for IMAGE; they differ by far more than rounding."""
    root, files = Path(mkdtemp()), []
    for seed in range(FILES):
        query: Any = ["final", "block_k"][seed % 2]
        phase = ["group", "group", "shared"][seed % 3]
        sizes = {"num_classes": 3 + seed % 2, "prompt_length": 1 + seed % 2, "pool_size": 3, "query": query}
        adapter = make_adapter(tiny_vit(), seed, phase, **sizes)
        with torch.no_grad():
            files.append((save(adapter, root / str(seed)), adapter(IMAGE)[0]))
    return tuple(files)


@pytest.fixture(autouse=True, scope="module")
def _files() -> Any:
    prompt_files()  # before threads need it: building a ViT uses the global generator
    yield
    shutil.rmtree(prompt_files()[0][0].parent)
    prompt_files.cache_clear()


def is_answer(logits: Tensor, file: int) -> bool:
    expected = prompt_files()[file][1]
    return logits.shape == expected.shape and torch.allclose(logits, expected, atol=1e-3)


def test_the_answers_differ() -> None:
    for first in range(FILES):
        assert [is_answer(prompt_files()[first][1], file) for file in range(FILES)].count(True) == 1


class Sequential(RuleBasedStateMachine):
    """A bank against a dictionary from name to prompt file."""

    @initialize(names=st.lists(st.sampled_from(NAMES), max_size=4, unique=True))
    def fill(self, names: list[str]) -> None:
        self.bank = PromptBank(tiny_vit(), capacity=CAPACITY)
        self.model: dict[str, int] = {}
        self.pinned: set[str] = set()
        for file, name in enumerate(names):
            self.add(name, file, pinned=False)

    @rule(name=st.sampled_from(NAMES), file=st.integers(0, FILES - 1), pinned=st.booleans())
    def add(self, name: str, file: int, pinned: bool) -> None:
        pinned = pinned and len(self.pinned) < CAPACITY - 1
        if name in self.model:
            with pytest.raises(InputError, match="already has a task"):
                self.bank.add(name, prompt_files()[file][0], pinned)
            return
        self.bank.add(name, prompt_files()[file][0], pinned)
        self.model[name] = file
        self.pinned |= {name} if pinned else set()

    @rule(name=st.sampled_from(NAMES), file=st.integers(0, FILES - 1))
    def replace(self, name: str, file: int) -> None:
        if name not in self.model:
            with pytest.raises(InputError, match="no task"):
                self.bank.replace(name, prompt_files()[file][0])
            return
        self.bank.replace(name, prompt_files()[file][0])
        self.model[name] = file

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        if name not in self.model:
            with pytest.raises(InputError, match="no task"):
                self.bank.remove(name)
            return
        self.bank.remove(name)
        del self.model[name]
        self.pinned -= {name}

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        known = st.sampled_from(sorted(self.model))
        tasks = data.draw(st.lists(known | st.none(), min_size=1, max_size=4), label="tasks")
        distinct = {self.model[name] for name in tasks if name is not None}
        pinned = {self.model[name] for name in self.pinned} - distinct
        images = IMAGE.expand(len(tasks), -1, -1, -1)
        if len(distinct) > CAPACITY - len(pinned):
            with pytest.raises(InputError, match="Split the batch"):
                self.bank(images, tasks)
            return
        for name, result in zip(tasks, self.bank(images, tasks), strict=True):
            assert result.task == name
            assert name is None or is_answer(result.logits, self.model[name])

    @invariant()
    def slots_are_accounted_for(self) -> None:
        if not hasattr(self, "bank"):
            return
        slots = slots_of(self.bank)
        assert set(slots) == set(self.model) == set(self.bank.tasks)
        taken: dict[int, set[int]] = {}
        for name, slot in slots.items():
            if slot is not None:
                taken.setdefault(slot, set()).add(self.model[name])
            assert slot is not None or name not in self.pinned
        assert all(len(files) == 1 for files in taken.values())
        assert len(taken) + free_slots(self.bank) == CAPACITY
        assert not any(version.leases for version in self.bank._registry._versions.values())


TestSequential = Sequential.TestCase
TestSequential.settings = hypothesis.settings(max_examples=30, stateful_step_count=20, deadline=None)


class Soak:
    """Threads that change and ask the bank, and a record of what each name may answer at each time.

    Each name has an owner, who alone adds, replaces and removes it, and who therefore knows what it must answer. Other
    threads ask for any name; while a change is under way, the answer before and after it are right.
    """

    def __init__(self, seconds: float, threads: int) -> None:
        self.bank = PromptBank(tiny_vit(), capacity=4)
        # What each name may answer, a set for each time at which that changed; None for no task.
        self.history: dict[str, list[set[int | None]]] = {f"task{number}": [{None}] for number in range(threads // 2)}
        self.lock = threading.Lock()
        self.stop = time.monotonic() + seconds
        self.errors: list[str] = []
        self.counts = {"answers": 0, "changes": 0, "unknown": 0}
        names = list(self.history)
        owners = [threading.Thread(target=self.guard, args=(self.own, name, name)) for name in names]
        guests = [
            threading.Thread(target=self.guard, args=(self.visit, number, None)) for number in range(threads // 2)
        ]
        self.threads = [*owners, *guests]

    def run(self) -> None:
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join(timeout=120)
        assert not any(thread.is_alive() for thread in self.threads), "a thread waits forever"
        assert not self.errors, self.errors[:3]

    def guard(self, action: Any, seed: Any, name: str | None) -> None:
        rng = random.Random(str(seed))
        try:
            while time.monotonic() < self.stop and not self.errors:
                action(rng, name)
        except Exception as error:  # reported by the main thread
            self.errors.append(repr(error))

    def own(self, rng: random.Random, name: str) -> None:
        """Change the task, then check its answer at once: a stale version would show."""
        (before,) = self.history[name][-1]
        file: int | None = rng.randrange(FILES)
        if before is not None and rng.random() < 0.3:
            file = None
        with self.lock:
            self.history[name].append({before, file})
        if file is None:
            self.bank.remove(name)
        elif before is None:
            self.bank.add(name, prompt_files()[file][0])
        else:
            self.bank.replace(name, prompt_files()[file][0])
        with self.lock:
            self.history[name].append({file})
            self.counts["changes"] += 1
        if file is not None and not is_answer(self.bank(IMAGE, name)[0].logits, file):
            self.errors.append(f"stale or wrong answer for {name}")

    def visit(self, rng: random.Random, _: None) -> None:
        tasks = rng.sample(list(self.history), rng.randint(1, 3))
        with self.lock:
            start = {name: len(self.history[name]) - 1 for name in tasks}
        error, output = None, []
        try:
            output = self.bank(IMAGE.expand(len(tasks), -1, -1, -1), tasks)[:]
        except InputError as raised:
            error = str(raised)
        with self.lock:
            possible = {name: set().union(*self.history[name][start[name] :]) for name in tasks}
            if error is not None:
                self.counts["unknown"] += 1
                if "no task" not in error or not any(None in possible[name] for name in tasks):
                    self.errors.append(error)
            for result in output:
                self.counts["answers"] += 1
                files = possible[str(result.task)] - {None}
                if not any(is_answer(result.logits, file) for file in files):
                    self.errors.append(f"wrong answer for {result.task}")


@pytest.mark.parametrize(
    ("seconds", "threads"), [(4, 24), pytest.param(60, 200, marks=[pytest.mark.slow, pytest.mark.nightly])]
)
def test_threads_that_change_and_ask(seconds: float, threads: int) -> None:
    soak = Soak(seconds, threads)
    soak.run()
    assert min(soak.counts[name] for name in ("answers", "changes")) >= 20, soak.counts
    registry = soak.bank._registry
    assert not any(version.leases for version in registry._versions.values())
    for name in soak.bank.tasks:
        soak.bank.remove(name)
    assert free_slots(soak.bank) == 4
    assert not registry._versions


def test_two_threads_add_the_same_name(tmp_path: Path) -> None:
    bank, results = PromptBank(tiny_vit(), capacity=2), []
    barrier = threading.Barrier(8)

    def add(file: int) -> None:
        barrier.wait()
        try:
            bank.add("task", prompt_files()[file][0])
            results.append(file)
        except InputError as error:
            assert "already has a task" in str(error)  # noqa: PT017 - in a thread

    threads = [threading.Thread(target=add, args=(number % FILES,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 1
    assert is_answer(bank(IMAGE, "task")[0].logits, results[0])
    assert free_slots(bank) == 1


def test_a_batch_waits_for_slots_of_other_batches() -> None:
    bank = PromptBank(tiny_vit(), capacity=2)
    for file, name in enumerate(["a", "b", "c"]):
        bank.add(name, prompt_files()[file][0])
    answers: list[Tensor] = []
    with bank._registry.lease(["a", "b"]):
        thread = threading.Thread(target=lambda: answers.append(bank(IMAGE, "c")[0].logits))
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive()
        assert not answers
    thread.join(timeout=30)
    assert is_answer(answers[0], 2)
