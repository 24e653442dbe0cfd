"""A training step reads nothing back from its device, and one that diverges leaves the last good state."""

from __future__ import annotations

import functools
import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.amp import GradScaler

from lpt_peft.errors import StateError
from lpt_peft.prompts import decay_selected
from lpt_peft.recipe import make_accelerator, train
from lpt_peft.recipe.resume.checkpoint_io import checkpoints
from lpt_peft.recipe.training.divergence import DivergenceFlag
from lpt_peft.recipe.training.phase import PhaseRun
from tests.host_reads import count_host_reads
from tests.recipe.tiny import PHASE, SETTINGS, QuietLoss, in_ranks, result_of, same, striped_data, tiny_adapter

EVERYTHING = replace(SETTINGS, decay="selected", clip_norm=0.5, average=0.9, accumulate=2)
IMAGES, LABELS = (tensor[:16] for tensor in striped_data()[0].tensors)
OURS = ("lpt_peft/recipe/", "lpt_peft/prompts.py", "lpt_peft/adapter.py", "lpt_peft/output.py", "lpt_peft/heads.py")


class Scripted(QuietLoss):
    """The objective, its value or its gradient multiplied by a factor for each call."""

    def __init__(self, value=(), gradient=()):
        super().__init__(PHASE.epochs)
        self.factors, self.calls = (value, gradient), 0

    def forward(self, output, target, epoch):
        value, gradient = (dict(factors).get(self.calls, 1.0) for factors in self.factors)
        self.calls += 1
        if gradient != 1.0:
            output.logits.register_hook(lambda incoming: gradient * incoming)
        return value * super().forward(output, target, epoch)


def phase_run(phase="group", settings=EVERYTHING, *, criterion=None, scaler=None, check_every=16, steps=100, **options):
    adapter = tiny_adapter(head_dropout=0.0)
    adapter.phase = "shared" if phase == "shared" else "group"
    if phase == "joint":
        adapter.shared.requires_grad_(True)
    accelerator = make_accelerator(settings)
    accelerator.scaler = scaler
    run = PhaseRun(
        adapter.train(),
        phase,
        settings=settings,
        phase=PHASE,
        criterion=criterion or QuietLoss(PHASE.epochs),
        steps=steps,
        accelerator=accelerator,
        check_every=check_every,
        **options,
    )
    return adapter, run


def everything_of(adapter, run):
    """Parameters, usage, momentum and average, and the numbers of a checkpoint."""
    tensors, numbers = run.state()
    return {**result_of(adapter), **{name: tensor.clone() for name, tensor in tensors.items()}}, numbers


@pytest.mark.parametrize("phase", ["shared", "group", "joint"])
@pytest.mark.parametrize("settings", [SETTINGS, EVERYTHING])
def test_a_step_reads_nothing_from_the_device(phase, settings):
    """The forward, the loss, the backward pass, the update and the average; the loss's own checks are not counted."""
    _, run = phase_run(phase, settings)
    for _ in range(3):
        with count_host_reads() as reads:
            run.advance(IMAGES, LABELS)
        assert not [place for place in reads.locations if any(ours in place for ours in OURS)]
    with count_host_reads() as reads:
        run.check()
    assert len(reads) == 1, "one process reads one flag"


@pytest.mark.parametrize("scaler", [None, GradScaler("cpu", init_scale=1.0, growth_interval=10**6)])
def test_a_whole_step_without_a_loss_of_ours_reads_nothing(scaler):
    def criterion(output, target, epoch):
        return torch.nn.functional.cross_entropy(output.logits, target) + (1 - output.similarity).mean()

    _, run = phase_run(criterion=criterion, scaler=scaler)
    for _ in range(2):
        with count_host_reads() as reads:
            run.advance(IMAGES, LABELS)
        assert not reads.locations


def test_the_counter_sees_what_is_counted_here():
    """What a step did before: a condition on a tensor and boolean indexing."""
    flag, keys = torch.zeros(()), torch.nn.Parameter(torch.ones(3, 2))
    with count_host_reads() as reads:
        bool(flag > 0)
        keys.detach()[torch.tensor([True, False, True])].sum()
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        ({"value": {4: math.nan}}, r"The loss became nan in step 2 \(epoch 0\) of phase group"),
        ({"value": {5: math.inf}}, "The loss became inf in step 2"),
        ({"gradient": {4: math.inf}}, r"A gradient became infinite or NaN at a loss of \d+\.\d+ in step 2"),
    ],
)
def test_a_bad_step_leaves_the_last_good_state(criterion, words):
    """Read eleven steps later: nothing of the bad step, nor of the good ones after it, was taken."""
    adapter, run = phase_run()
    for _ in range(2):
        run.advance(IMAGES, LABELS)
    good = everything_of(adapter, run)
    adapter, run = phase_run(criterion=Scripted(**criterion))
    for _ in range(13):
        run.advance(IMAGES, LABELS)
    with pytest.raises(StateError, match=words):
        run.check()
    with pytest.raises(StateError, match=words):
        run.state()
    run._divergence = DivergenceFlag(torch.device("cpu"))  # to see what would have been saved
    state, numbers = everything_of(adapter, run)
    assert same(state, good[0])
    assert numbers == {**good[1], "learning_rate": numbers["learning_rate"]}
    assert numbers["step"] == 2


@pytest.mark.parametrize("check_every", [1, 3])
def test_the_flag_is_read_every_so_many_steps(check_every):
    _, run = phase_run(criterion=Scripted(value={2: math.nan}), check_every=check_every)  # in step 1
    for _ in range(max(1, check_every - 1)):
        run.advance(IMAGES, LABELS)
    with pytest.raises(StateError, match="in step 1 "):
        run.advance(IMAGES, LABELS)


def test_the_flag_is_read_at_the_end_of_an_epoch():
    _, run = phase_run(criterion=Scripted(value={2: math.nan}), steps=4)
    for _ in range(3):
        run.advance(IMAGES, LABELS)
    with pytest.raises(StateError, match=r"in step 1 \(epoch 0\)"):
        run.advance(IMAGES, LABELS)


def test_steps_do_not_depend_on_when_they_are_checked():
    states = []
    for check_every in (1, 16):
        adapter, run = phase_run(check_every=check_every)
        for _ in range(5):
            run.advance(IMAGES, LABELS)
        states.append(everything_of(adapter, run))
    assert same(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def test_one_process_needs_no_device_to_be_stopped():
    _, run = phase_run()
    run.advance(IMAGES, LABELS, lambda: False)
    assert not run.stopped
    run.advance(IMAGES, LABELS, lambda: True)
    assert run.stopped


def test_a_scaled_loss_trains_as_an_unscaled_one():
    """A scale that is a power of two changes no bit; an overflow is skipped, and the scale halves."""
    states = []
    for scaler in (None, GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)):
        adapter, run = phase_run(scaler=scaler)
        for _ in range(3):
            run.advance(IMAGES, LABELS)
        states.append(everything_of(adapter, run)[0])
    assert same(*states)
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    adapter, run = phase_run(settings=replace(EVERYTHING, average=None), criterion=Scripted(gradient={0: math.inf}))
    run._accelerator.scaler = scaler
    before = result_of(adapter)
    run.advance(IMAGES, LABELS)
    run.check()
    after = result_of(adapter)
    assert all(torch.equal(after[name], before[name]) for name in adapter.adapter_state_dict())
    momentum = run.state()[0]
    assert all(not momentum[name].any() for name in momentum if name.startswith("momentum/"))
    assert scaler.get_scale() == 2.0**9
    run.advance(IMAGES, LABELS)
    run.check()
    assert not torch.equal(adapter.pool.prompts, before["pool.prompts"])


def test_a_scaled_loss_that_is_nan_stops_the_run():
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    adapter, run = phase_run(criterion=Scripted(value={2: math.nan}), scaler=scaler)
    run.advance(IMAGES, LABELS)
    good = result_of(adapter)
    for _ in range(3):
        run.advance(IMAGES, LABELS)
    with pytest.raises(StateError, match="The loss became nan in step 1"):
        run.check()
    assert same(result_of(adapter), good), "steps after it were not taken, though their gradients were finite"


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 4, 3)])
def test_decay_of_selected_groups_by_boolean_indexing(shape):
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
    parameter.grad = torch.randn(shape, generator=generator)
    parameter.grad[[1, 3]] = 0
    expected = parameter.grad.clone()
    chosen = torch.tensor([True, False, True, False, True])
    expected[chosen] += 0.1 * parameter.detach()[chosen]
    with count_host_reads() as reads:
        decay_selected(parameter, 0.1)
    assert torch.equal(parameter.grad, expected)
    assert not reads


@pytest.fixture
def checked_every_third_step(monkeypatch):
    """As on a GPU, where reading costs time; epochs have eight steps."""
    original = PhaseRun.__init__
    monkeypatch.setattr(PhaseRun, "__init__", functools.partialmethod(original, check_every=3))


def ranks(tmp_path, loss):
    """Two processes of one run; what the last checkpoint is called."""
    dataset, labels = striped_data()
    phase = replace(PHASE, epochs=2)
    settings = replace(SETTINGS, batch_size=4, shared=phase, group=replace(PHASE, epochs=0), save_every=1000)

    def one():
        rank = int(os.environ["RANK"])
        adapter = tiny_adapter(head_dropout=0.0)
        train(adapter, dataset, labels, settings, criterion=loss(rank), checkpoints=tmp_path / "run", progress=False)
        save_file(result_of(adapter), tmp_path / f"{rank}.safetensors")

    return in_ranks(one)


def test_processes_read_a_stop_at_the_same_later_step(tmp_path, checked_every_third_step):
    class Asking(QuietLoss):
        left = 5

        def __init__(self, rank):
            super().__init__(2)
            self.rank = rank

        def forward(self, output, target, epoch):
            Asking.left -= 1
            if Asking.left == 0 and self.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(output, target, epoch)

    assert ranks(tmp_path, Asking) == [130, 130]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["1-shared-00000006"], "asked for in step 5"
    Asking.left = -1
    assert ranks(tmp_path, Asking) == [0, 0]
    resumed = load_file(tmp_path / "0.safetensors")
    shutil.rmtree(tmp_path / "run")
    assert ranks(tmp_path, Asking) == [0, 0]
    assert same(resumed, load_file(tmp_path / "1.safetensors"))


def test_processes_read_a_nan_of_one_of_them_at_the_same_later_step(tmp_path, checked_every_third_step, capfd):
    assert ranks(tmp_path, lambda rank: Scripted(value={4: math.nan} if rank == 1 else {})) == [1, 1]
    assert capfd.readouterr().out.count("StateError: The loss became nan in step 4 (epoch 0) of phase shared") == 2
    assert not checkpoints(tmp_path / "run")
