"""Runs that are killed and started again: the same prompts, to the last bit, as without a break."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import TensorDataset

from lpt_peft.errors import StateError
from lpt_peft.recipe import train
from lpt_peft.recipe.resume.checkpoint_io import checkpoints, read_checkpoint, write_checkpoint
from lpt_peft.recipe.resume.interrupt import Interruption
from tests.recipe.tiny import (
    COUNTS,
    PHASE,
    SETTINGS,
    SHORT,
    QuietLoss,
    Shaken,
    in_child,
    in_ranks,
    noisy_validation,
    result_of,
    same,
    striped_data,
    tiny_adapter,
)

STEPS = 2 * 2 * (sum(COUNTS) // 8 + 1)  # two phases of two epochs
FULL = replace(SHORT, clip_norm=1.0, average=0.9, keep="best", decay="selected", init_groups="random")


class Deadly(QuietLoss):
    """The objective, which kills its process in the middle of a step."""

    def __init__(self, step=None):
        super().__init__(epochs=8)
        self.left = step

    def forward(self, output, target, epoch):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left = None if self.left is None else self.left - 1
        return super().forward(output, target, epoch)


def run(folder, settings=SHORT, *, step=None, validation=None, **options):
    """A whole run on shaken images, killed at `step` of this process; what it leaves."""
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    options = {"criterion": Deadly(step), **options}
    history = train(
        adapter, Shaken(dataset), labels, settings, validation=validation, checkpoints=folder, progress=False, **options
    )
    return result_of(adapter), history


@pytest.fixture(scope="module")
def whole():
    """What a run without checkpoints and without a break gives."""
    return run(None)


def test_killed_at_twenty_random_steps(tmp_path, whole):
    phases = set()
    for number, step in enumerate(random.Random(0).choices(range(STEPS), k=20)):
        folder = tmp_path / str(number)
        assert in_child(lambda f=folder, s=step: run(f, step=s)) == -signal.SIGKILL
        phases |= {path.name.split("-")[1] for path in checkpoints(folder)[-1:]}
        result, history = run(folder)
        assert same(result, whole[0]), f"killed at step {step}"
        assert history == whole[1]
    assert phases == {"shared", "group"}


def test_killed_again_and_again_at_any_moment(tmp_path):
    """Everything switched on, killed from outside after random times, until it comes through."""
    validation = striped_data(1)[0]
    start = time.perf_counter()
    wanted = run(tmp_path / "whole", FULL, validation=validation)
    length = time.perf_counter() - start
    draw, kills = random.Random(1), 0
    while in_child(lambda: run(tmp_path / "cut", FULL, validation=validation), kill_after=length / 4 * draw.random()):
        kills += 1
        if kills == 12:
            break
    result, history = run(tmp_path / "cut", FULL, validation=validation)
    assert kills >= 1
    assert same(result, wanted[0])
    assert history == wanted[1]


def test_killed_while_saving(tmp_path, whole, monkeypatch):
    original = os.fsync
    for number in (*range(5), 16, 17, 18):
        left = [number]

        def dying(descriptor, left=left):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            original(descriptor)

        folder = tmp_path / str(number)
        monkeypatch.setattr(os, "fsync", dying)
        assert in_child(lambda f=folder: run(f)) == -signal.SIGKILL
        monkeypatch.setattr(os, "fsync", original)
        assert same(run(folder)[0], whole[0]), number
        assert not list(folder.glob("*.tmp")), "what the killed run left half written is gone"


def test_two_processes_killed_at_twenty_random_steps(tmp_path):
    """One rank of two dies; both start again."""

    def ranks(folder, at=None):
        def one():
            result, _ = run(folder, step=at if os.environ["RANK"] == "1" else None)
            save_file(result, tmp_path / f"{folder.name}-{os.environ['RANK']}.safetensors")

        return in_ranks(one)

    assert ranks(tmp_path / "whole") == [0, 0]
    wanted = load_file(tmp_path / "whole-0.safetensors")
    assert same(wanted, load_file(tmp_path / "whole-1.safetensors"))
    for number, step in enumerate(random.Random(2).choices(range(STEPS), k=20)):
        folder = tmp_path / str(number)
        assert -signal.SIGKILL in ranks(folder, step)
        assert ranks(folder) == [0, 0]
        for rank in range(2):
            assert same(load_file(tmp_path / f"{number}-{rank}.safetensors"), wanted), f"killed at step {step}"


def test_patience_is_remembered(tmp_path):
    """Killed in the epoch after a validation that was no better: the phase ends where it would have ended."""
    settings = replace(
        SHORT, shared=replace(PHASE, epochs=8), group=replace(PHASE, epochs=0), patience=2, keep="best", seed=2
    )
    options = {"validation": noisy_validation(), "settings": settings}
    result, history = run(None, **options)
    assert 3 <= len(history) < 8
    for step in ((len(history) - 1) * 4 - 1, (len(history) - 1) * 4 + 2):
        folder = tmp_path / str(step)
        assert in_child(lambda f=folder, s=step: run(f, step=s, **options)) == -signal.SIGKILL
        again = run(folder, **options)
        assert same(again[0], result)
        assert again[1] == history


def test_the_end_of_a_phase_is_always_saved(tmp_path, whole):
    rare = replace(SHORT, save_every=1000)
    run(tmp_path, rare)
    assert [path.name for path in checkpoints(tmp_path)] == ["1-shared-00000008", "2-group-00000008"]
    assert same(run(tmp_path, rare, step=0)[0], whole[0])


def test_worker_processes_change_nothing(tmp_path, whole):
    with_workers = replace(SHORT, num_workers=2)
    assert same(run(None, with_workers)[0], whole[0])
    assert in_child(lambda: run(tmp_path, with_workers, step=13)) == -signal.SIGKILL
    assert same(run(tmp_path, SHORT)[0], whole[0]), "their number may change on the way"


def test_the_callers_random_numbers_do_not_matter_and_stay(tmp_path, whole):
    state = random.getstate(), torch.get_rng_state()
    random.seed(5)
    torch.manual_seed(5)
    wanted = random.Random(5).random(), torch.rand((), generator=torch.Generator().manual_seed(5))
    assert same(run(tmp_path)[0], whole[0])
    assert (random.random(), torch.rand(())) == wanted
    random.setstate(state[0])
    torch.set_rng_state(state[1])


def test_interrupt_saves_and_goes_on(tmp_path, whole):
    class Interrupted(Deadly):
        def forward(self, output, target, epoch):
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)
            self.left -= 1
            return QuietLoss.forward(self, output, target, epoch)

    Interrupted.__qualname__ = Deadly.__qualname__  # the same run
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=r"after step 6 of phase group, saved as .*2-group-00000006"):
        run(tmp_path, replace(SHORT, save_every=1000), criterion=Interrupted(8 + 5))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert same(run(tmp_path, replace(SHORT, save_every=1000))[0], whole[0])


def test_interrupt_in_the_last_validation_of_a_phase(tmp_path, whole):
    class Asking(TensorDataset):
        def __getitem__(self, index):
            if len(checkpoints(tmp_path)) == 1 and index == 3:  # the second epoch's: the last one of phase "shared"
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    settings = replace(SHORT, save_every=4)
    validation = striped_data(1)[0]
    with pytest.raises(KeyboardInterrupt, match="after step 8 of phase shared, saved as .*1-shared-00000008"):
        run(tmp_path, settings, validation=Asking(*validation.tensors))
    assert [path.name for path in checkpoints(tmp_path)] == ["1-shared-00000004", "1-shared-00000008"]
    result, history = run(tmp_path, settings, validation=validation)
    assert same(result, whole[0])
    assert len(history) == 4


def test_second_interrupt_stops_at_once():
    handler = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with Interruption(watch=False):
        assert signal.getsignal(signal.SIGINT) is handler
    thread = threading.Thread(target=lambda: Interruption().__enter__())  # signals are the main thread's
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handler


def test_interrupt_stops_all_processes_at_the_same_step(tmp_path):
    def one():
        loss = Deadly()
        if os.environ["RANK"] == "1":
            loss.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM) if len(seen) == 5 else None)
        loss.register_forward_pre_hook(lambda *_: seen.append(0))
        run(tmp_path, criterion=loss)

    seen = []
    assert in_ranks(one) == [130, 130]
    assert [path.name for path in checkpoints(tmp_path)][-1] == "1-shared-00000006"


def test_a_finished_run_is_not_trained_again(tmp_path, whole):
    run(tmp_path)
    result, history = run(tmp_path, step=0)  # a single step would kill this process
    assert same(result, whole[0])
    assert history == whole[1]


def test_another_run_is_refused_with_the_differences_listed(tmp_path):
    run(tmp_path)
    before = [path.name for path in checkpoints(tmp_path)]
    other = replace(SHORT, seed=3, group=replace(SHORT.group, learning_rate=0.5))
    with pytest.raises(StateError) as refusal:
        run(tmp_path, other)
    told = str(refusal.value)
    assert "settings.seed is 3 here and was 0" in told
    assert "settings.group.learning_rate is 0.5 here and was 2.0" in told
    assert "settings.batch_size" not in told
    assert "--no-resume" in told
    with pytest.raises(StateError, match="criterion is None here"):
        run(tmp_path, criterion=None)
    with pytest.raises(StateError, match="validation images is 31 here and was 0"):
        run(tmp_path, validation=striped_data(1)[0])
    dataset, labels = striped_data()
    for change, words in (
        ({"adapter": tiny_adapter(head_dropout=0.5)}, "prompts.head_dropout is 0.5"),
        ({"labels": [*labels[:-1], 0]}, "labels_crc32"),
    ):
        given = {"adapter": tiny_adapter(), "labels": labels, **change}
        with pytest.raises(StateError, match=words):
            train(given["adapter"], dataset, given["labels"], SHORT, checkpoints=tmp_path, progress=False)
    assert [path.name for path in checkpoints(tmp_path)] == before


def test_another_number_of_processes_is_refused(tmp_path):
    run(tmp_path)

    def one():
        with pytest.raises(StateError, match="processes is 2 here and was 1"):
            run(tmp_path)

    assert in_ranks(one) == [0, 0]


def test_no_resume_starts_anew(tmp_path):
    run(tmp_path, replace(SHORT, seed=7))
    result, _ = run(tmp_path, resume=False)
    assert same(result, run(None)[0])
    assert all(read_checkpoint(path)[1]["about"]["settings.seed"] == 0 for path in checkpoints(tmp_path))


def test_checkpoints_are_few_and_hold_nothing_of_the_backbone(tmp_path):
    run(tmp_path, replace(SHORT, save_every=1, keep_checkpoints=3))
    assert [path.name for path in checkpoints(tmp_path)] == [f"2-group-{step:08}" for step in (6, 7, 8)]
    assert sorted(path.name for path in checkpoints(tmp_path)[0].iterdir()) == ["state.json", "state.safetensors"]
    tensors, numbers = read_checkpoint(checkpoints(tmp_path)[-1])
    learnt = tiny_adapter().adapter_state_dict()
    opened = {"pool.prompts", "pool.keys", "head.weight"}
    assert set(tensors) == {f"adapter/{n}" for n in learnt} | {f"momentum/{n}" for n in opened} | {"usage"}
    assert numbers["about"]["settings.seed"] == 0


def test_nan_keeps_the_checkpoint_before(tmp_path, whole):
    class Broken(Deadly):
        def forward(self, output, target, epoch):
            self.left -= 1
            loss = QuietLoss.forward(self, output, target, epoch)
            return loss * float("nan") if self.left < 0 else loss

    Broken.__qualname__ = Deadly.__qualname__
    with pytest.raises(StateError, match=r"loss became nan in step 5 \(epoch 1\) of phase group"):
        run(tmp_path, criterion=Broken(8 + 5))
    assert checkpoints(tmp_path)[-1].name == "2-group-00000004"
    assert same(run(tmp_path)[0], whole[0])


def test_full_disk_leaves_the_old_checkpoint(tmp_path, whole):
    """A write that really fails: the system refuses files beyond a few kilobytes."""

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        class Filling(Deadly):
            def forward(self, output, target, epoch):
                if self.left == 0:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
                self.left -= 1
                return QuietLoss.forward(self, output, target, epoch)

        Filling.__qualname__ = Deadly.__qualname__
        with pytest.raises(StateError, match="cannot be written: .*The last one, .*1-shared-00000004, is whole"):
            run(tmp_path, criterion=Filling(5))

    assert in_child(fill) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["1-shared-00000002", "1-shared-00000004"]
    assert same(run(tmp_path)[0], whole[0])


def test_first_checkpoint_on_a_full_disk(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left on device. There was none before"):
        write_checkpoint(tmp_path / "new", "1-shared-00000001", {"a": torch.zeros(2)}, {}, keep=1)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, file):
    run(tmp_path)
    broken = checkpoints(tmp_path)[-1] / file
    broken.write_bytes(broken.read_bytes()[:-9] + bytes(9))
    with pytest.raises(StateError, match="2-group-00000008 is damaged.*Remove it"):
        run(tmp_path)


def test_another_format_is_refused(tmp_path):
    run(tmp_path)
    path = checkpoints(tmp_path)[-1] / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(StateError, match="another version"):
        run(tmp_path)


def test_what_diverged_is_not_saved(tmp_path):
    dataset, labels = striped_data()
    wild = replace(SETTINGS, shared=replace(PHASE, learning_rate=1e38, warmup=0.0), save_every=1)
    images = TensorDataset(*dataset.tensors)
    with pytest.raises(StateError, match="NaN|nan|inf"):
        train(tiny_adapter(), images, labels, wild, checkpoints=Path(tmp_path), progress=False)
    for path in checkpoints(tmp_path):
        assert all(bool(tensor.isfinite().all()) for tensor in read_checkpoint(path)[0].values())
