"""Runs that are killed and resumed: the same prompts, to the last bit, as without an interruption."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from lpt_peft.errors import StateError
from lpt_peft.recipe import train
from lpt_peft.recipe.resume import checkpoint_io
from lpt_peft.recipe.resume.checkpoint_io import checkpoints, read_checkpoint, write_checkpoint
from lpt_peft.recipe.resume.interrupt import Interruption
from lpt_peft.recipe.training.phase import PhaseRun
from tests.processes import Child, run_ranks
from tests.recipe.tiny import (
    PHASE,
    SETTINGS,
    SHORT,
    FailingLoss,
    NoiseFreeLoss,
    PowerCut,
    RandomlyScaled,
    kill_this_process,
    noisy_validation,
    power_cut,
    result_of,
    same,
    striped_data,
    tiny_adapter,
)

FULL = replace(SHORT, clip_norm=1.0, average=0.9, keep="best", decay="selected", init_groups="random")
ADAMW = replace(FULL, optimizer="adamw", weight_noise=0.2, shared=replace(FULL.shared, head_learning_rate=3.0))
SYNCS = 4  # of a checkpoint: two files, its folder, the folder above


def run(folder, settings=SHORT, *, step=None, fail=power_cut, validation=None, **options):
    """A run on randomly scaled images, which fails at `step` of this process; its result and history."""
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    options = {"criterion": FailingLoss(step, fail), **options}
    images = RandomlyScaled(dataset)
    history = train(
        adapter, images, labels, settings, validation=validation, checkpoints=folder, progress=False, **options
    )
    return result_of(adapter), history


class FailingImages(TensorDataset):
    """Validation images, which fail at read number `number`."""

    def __init__(self, number, fail):
        super().__init__(*striped_data(1)[0].tensors)
        self.remaining, self.fail = number, fail

    def __getitem__(self, index):
        if self.remaining == 0:
            self.fail()
        self.remaining -= 1
        return super().__getitem__(index)


def failing_call(function, number, fail):
    """`function`, which fails before call number `number`."""
    remaining = [number]

    def call(*args, **options):
        if remaining[0] == 0:
            fail()
        remaining[0] -= 1
        return function(*args, **options)

    return call


def interrupted_run(folder, point, number, fail=power_cut):
    """A run with everything enabled that fails at a point of this kind."""
    validation = striped_data(1)[0]
    with pytest.MonkeyPatch.context() as patch:
        if point == "validation":
            validation = FailingImages(number, fail)
        elif point == "write":
            patch.setattr(os, "fsync", failing_call(os.fsync, number, fail))
        elif point == "removal of an old checkpoint":
            patch.setattr(checkpoint_io.shutil, "rmtree", failing_call(shutil.rmtree, number, fail))
        elif point == "end of phase":
            patch.setattr(PhaseRun, "finalize", failing_call(PhaseRun.finalize, number, fail))
        run(folder, FULL, step=number if point == "step" else None, fail=fail, validation=validation)


@pytest.fixture(scope="module")
def uninterrupted():
    """Result and history of a run without checkpoints."""
    return run(None)


@pytest.fixture(scope="module")
def full_uninterrupted():
    """The same with everything enabled."""
    return run(None, FULL, validation=striped_data(1)[0])


@pytest.mark.parametrize(
    ("point", "number", "last"),
    [
        ("step", 0, None),  # nothing is saved yet
        ("step", 5, "1-shared-00000004"),
        ("step", 8, "1-shared-00000008"),  # the first step of the second phase
        ("step", 15, "2-group-00000006"),  # the last step
        ("validation", 40, "1-shared-00000006"),  # the last epoch of phase 1, before its checkpoint
        ("validation", 3 * 31 + 20, "2-group-00000006"),
        *(("write", sync, None) for sync in range(3)),
        ("write", 3, "1-shared-00000002"),  # renamed, but the folder above is not synchronized
        *(("write", 5 * SYNCS + sync, "2-group-00000002") for sync in range(3)),
        ("removal of an old checkpoint", 1, "1-shared-00000008"),
        ("end of phase", 0, "1-shared-00000008"),
        ("end of phase", 1, "2-group-00000008"),
    ],
)
def test_a_run_cut_at_every_kind_of_point(tmp_path, full_uninterrupted, point, number, last):
    with pytest.raises(PowerCut):
        interrupted_run(tmp_path, point, number)
    found = checkpoints(tmp_path)
    assert (found[-1].name if found else None) == last
    result, history = run(tmp_path, FULL, validation=striped_data(1)[0])
    assert same(result, full_uninterrupted[0])
    assert history == full_uninterrupted[1]
    assert not list(tmp_path.glob("*.tmp")), "leftovers of the interrupted write are removed"


@pytest.mark.parametrize("step", [5, 13])
def test_an_interrupted_run_of_adamw_with_weight_noise(tmp_path, step):
    validation = striped_data(1)[0]
    expected, expected_history = run(None, ADAMW, validation=validation)
    with pytest.raises(PowerCut):
        run(tmp_path, ADAMW, step=step, validation=validation)
    tensors, _ = read_checkpoint(checkpoints(tmp_path)[-1])
    kinds = {name.partition("/")[0] for name in tensors}
    assert kinds == {"trained", "exp_avg", "exp_avg_sq", "optimizer_step", "average", "best", "usage"}
    result, history = run(tmp_path, ADAMW, validation=validation)
    assert same(result, expected)
    assert history == expected_history


@pytest.mark.parametrize(("point", "number"), [("validation", 40), ("write", 5 * SYNCS + 1)])
def test_a_killed_process(tmp_path, full_uninterrupted, point, number):
    with Child(interrupted_run, tmp_path, point, number, kill_this_process) as child:
        assert child.wait() == -signal.SIGKILL, child.output
    result, history = run(tmp_path, FULL, validation=striped_data(1)[0])
    assert same(result, full_uninterrupted[0])
    assert history == full_uninterrupted[1]


def test_cut_again_and_again(tmp_path, full_uninterrupted):
    """Each attempt gets three steps further."""
    attempts = 0
    while True:
        try:
            result, history = run(tmp_path, FULL, step=3, validation=striped_data(1)[0])
            break
        except PowerCut:
            attempts += 1
    assert attempts == 7, "every attempt but the last saves two steps"
    assert same(result, full_uninterrupted[0])
    assert history == full_uninterrupted[1]


def rank_killed(folder, rank, point, number):
    here = os.environ["RANK"] == str(rank)
    interrupted_run(folder, point, number if here else -1, kill_this_process)


def runs_of_ranks(*folders):
    return [run(folder, FULL, validation=striped_data(1)[0]) for folder in folders]


def test_a_killed_rank_of_two(tmp_path):
    """Rank 1 in a step of phase 2, and rank 0, which writes, during a checkpoint; then both start again."""
    points = [(tmp_path / "step", 1, "step", 13), (tmp_path / "write", 0, "write", 5 * SYNCS + 1)]
    for point in points:
        with pytest.raises(AssertionError, match="exit code -9"):
            run_ranks(rank_killed, *point, init=False)
        assert checkpoints(point[0])
    first, second = run_ranks(runs_of_ranks, None, *(point[0] for point in points), init=False)
    for result, history in (*first, *second):
        assert same(result, first[0][0])
        assert history == first[0][1]


def test_patience_is_remembered(tmp_path):
    """Cut in the epoch after a validation without improvement: the phase ends where it would have ended."""
    settings = replace(
        SHORT, shared=replace(PHASE, epochs=8), group=replace(PHASE, epochs=0), patience=2, keep="best", seed=2
    )
    options = {"validation": noisy_validation(), "settings": settings}
    result, history = run(None, **options)
    assert 3 <= len(history) < 8
    for step in ((len(history) - 1) * 4 - 1, (len(history) - 1) * 4 + 2):
        folder = tmp_path / str(step)
        with pytest.raises(PowerCut):
            run(folder, step=step, **options)
        resumed = run(folder, **options)
        assert same(resumed[0], result)
        assert resumed[1] == history


def test_the_end_of_a_phase_is_always_saved(tmp_path, uninterrupted):
    rare = replace(SHORT, save_every=1000)
    run(tmp_path, rare)
    assert [path.name for path in checkpoints(tmp_path)] == ["1-shared-00000008", "2-group-00000008"]
    assert same(run(tmp_path, rare, step=0)[0], uninterrupted[0])


def killed_with_workers(folder):
    run(folder, replace(SHORT, num_workers=2), step=13, fail=kill_this_process)


def test_worker_processes_change_nothing(tmp_path, uninterrupted):
    assert same(run(None, replace(SHORT, num_workers=2))[0], uninterrupted[0])
    with Child(killed_with_workers, tmp_path) as child:
        assert child.wait() == -signal.SIGKILL, child.output
    assert same(run(tmp_path, SHORT)[0], uninterrupted[0]), "their number may change when a run is resumed"


def test_the_callers_generators_do_not_matter_and_are_restored(tmp_path, uninterrupted):
    state = random.getstate(), torch.get_rng_state()
    random.seed(5)
    torch.manual_seed(5)
    expected = random.Random(5).random(), torch.rand((), generator=torch.Generator().manual_seed(5))
    assert same(run(tmp_path)[0], uninterrupted[0])
    assert (random.random(), torch.rand(())) == expected
    random.setstate(state[0])
    torch.set_rng_state(state[1])


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_is_saved_and_resumed(tmp_path, uninterrupted):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    rare = replace(SHORT, save_every=1000)
    with pytest.raises(KeyboardInterrupt, match=r"after step 6 of phase group, saved as .*2-group-00000006"):
        run(tmp_path, rare, step=8 + 5, fail=interrupt)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert same(run(tmp_path, rare)[0], uninterrupted[0])


def test_an_interruption_in_the_last_validation_of_a_phase(tmp_path, uninterrupted):
    class Interrupting(TensorDataset):
        def __getitem__(self, index):
            if len(checkpoints(tmp_path)) == 1 and index == 3:  # in the second epoch, the last of phase "shared"
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    settings = replace(SHORT, save_every=4)
    validation = striped_data(1)[0]
    with pytest.raises(KeyboardInterrupt, match="after step 8 of phase shared, saved as .*1-shared-00000008"):
        run(tmp_path, settings, validation=Interrupting(*validation.tensors))
    assert [path.name for path in checkpoints(tmp_path)] == ["1-shared-00000004", "1-shared-00000008"]
    result, history = run(tmp_path, settings, validation=validation)
    assert same(result, uninterrupted[0])
    assert len(history) == 4


def test_a_second_interrupt_stops_at_once():
    handler = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        interrupt()
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    with Interruption(watch=False):
        assert signal.getsignal(signal.SIGINT) is handler
    thread = threading.Thread(target=lambda: Interruption().__enter__())  # only the main thread handles signals
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handler


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupted_rank(folder):
    try:
        run(folder, step=5 if os.environ["RANK"] == "1" else None, fail=terminate)
    except KeyboardInterrupt as stopped:
        message = str(stopped)
    with pytest.raises(StateError, match="processes is 2 now and was 1"):
        run(folder.with_name("alone"))
    return message


def test_an_interruption_stops_all_processes_at_the_same_step(tmp_path):
    run(tmp_path / "alone")
    messages = run_ranks(interrupted_rank, tmp_path / "both", init=False)
    assert [message.split(",")[0] for message in messages] == ["stopped after step 6 of phase shared"] * 2
    assert [path.name for path in checkpoints(tmp_path / "both")][-1] == "1-shared-00000006"


def test_a_finished_run_is_not_trained_again(tmp_path, uninterrupted):
    run(tmp_path)
    result, history = run(tmp_path, step=0)  # a single step would raise PowerCut
    assert same(result, uninterrupted[0])
    assert history == uninterrupted[1]


def test_a_different_run_is_refused_with_the_differences_listed(tmp_path):
    run(tmp_path)
    before = [path.name for path in checkpoints(tmp_path)]
    changed = replace(SHORT, seed=3, group=replace(SHORT.group, learning_rate=0.5))
    with pytest.raises(StateError) as refusal:
        run(tmp_path, changed)
    message = str(refusal.value)
    assert "settings.seed is 3 now and was 0" in message
    assert "settings.group.learning_rate is 0.5 now and was 2.0" in message
    assert "settings.batch_size" not in message
    assert "--no-resume" in message
    with pytest.raises(StateError, match="criterion is None now"):
        run(tmp_path, criterion=None)
    with pytest.raises(StateError, match="validation images is 31 now and was 0"):
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


def test_no_resume_starts_again(tmp_path, uninterrupted):
    run(tmp_path, replace(SHORT, seed=7))
    result, _ = run(tmp_path, resume=False)
    assert same(result, uninterrupted[0])
    assert all(read_checkpoint(path)[1]["about"]["settings.seed"] == 0 for path in checkpoints(tmp_path))


def test_checkpoints_are_few_and_contain_nothing_of_the_backbone(tmp_path):
    run(tmp_path, replace(SHORT, save_every=1, keep_checkpoints=3))
    assert [path.name for path in checkpoints(tmp_path)] == [f"2-group-{step:08}" for step in (6, 7, 8)]
    assert sorted(path.name for path in checkpoints(tmp_path)[0].iterdir()) == ["state.json", "state.safetensors"]
    tensors, numbers = read_checkpoint(checkpoints(tmp_path)[-1])
    names = tiny_adapter().adapter_state_dict()
    trained = {"pool.prompts", "pool.keys", "head.weight"}
    assert set(tensors) == {f"trained/{n}" for n in names} | {f"momentum/{n}" for n in trained} | {"usage"}
    assert numbers["about"]["settings.seed"] == 0


def test_nan_keeps_the_earlier_checkpoint(tmp_path, uninterrupted):
    class Diverging(FailingLoss):
        def forward(self, output, target, epoch):
            self.remaining -= 1
            loss = NoiseFreeLoss.forward(self, output, target, epoch)
            return loss * float("nan") if self.remaining < 0 else loss

    Diverging.__qualname__ = FailingLoss.__qualname__  # the same run
    with pytest.raises(StateError, match=r"loss became nan in step 5 \(epoch 1\) of phase group"):
        run(tmp_path, criterion=Diverging(8 + 5))
    assert checkpoints(tmp_path)[-1].name == "2-group-00000004"
    assert same(run(tmp_path)[0], uninterrupted[0])


def fill_the_disk():
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))


def run_on_a_full_disk(folder):
    """A write that really fails: the system refuses files larger than 512 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(StateError) as error:
            run(folder, step=5, fail=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return str(error.value)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, uninterrupted):
    with Child(run_on_a_full_disk, tmp_path) as child:
        message = child.result()
    assert "cannot be written: " in message
    assert "The last checkpoint, " in message
    assert "1-shared-00000004, is intact" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-shared-00000002", "1-shared-00000004"]
    assert same(run(tmp_path)[0], uninterrupted[0])


def test_the_first_checkpoint_on_a_full_disk(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left on device. There is no earlier checkpoint"):
        write_checkpoint(tmp_path / "new", "1-shared-00000001", {"a": torch.zeros(2)}, {}, keep=1)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, file):
    run(tmp_path)
    broken = checkpoints(tmp_path)[-1] / file
    broken.write_bytes(broken.read_bytes()[:-9] + bytes(9))
    with pytest.raises(StateError, match="2-group-00000008 is damaged.*Remove it"):
        run(tmp_path)


def test_an_unknown_format_version_is_refused(tmp_path):
    run(tmp_path)
    path = checkpoints(tmp_path)[-1] / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(StateError, match="another version"):
        run(tmp_path)


def test_diverged_parameters_are_not_saved(tmp_path):
    dataset, labels = striped_data()
    excessive = replace(SETTINGS, shared=replace(PHASE, learning_rate=1e38, warmup=0.0), save_every=1)
    images = TensorDataset(*dataset.tensors)
    with pytest.raises(StateError, match="NaN|nan|inf"):
        train(tiny_adapter(), images, labels, excessive, checkpoints=Path(tmp_path), progress=False)
    for path in checkpoints(tmp_path):
        assert all(bool(tensor.isfinite().all()) for tensor in read_checkpoint(path)[0].values())
