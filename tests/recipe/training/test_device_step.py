"""A training step reads nothing from its device; a diverging step leaves the last finite state."""

from __future__ import annotations

import functools
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch.amp import GradScaler

from lpt_peft.errors import StateError
from lpt_peft.prompts import decay_selected
from lpt_peft.recipe import make_accelerator, train
from lpt_peft.recipe.resume.checkpoint_io import checkpoints
from lpt_peft.recipe.training.divergence import DivergenceFlag
from lpt_peft.recipe.training.phase import PhaseRun
from tests.host_reads import count_host_reads
from tests.processes import run_ranks
from tests.recipe.tiny import (
    PHASE,
    SETTINGS,
    FailingLoss,
    NoiseFreeLoss,
    result_of,
    same,
    striped_data,
    tiny_adapter,
)

EVERYTHING = replace(SETTINGS, decay="selected", clip_norm=0.5, average=0.9, accumulate=2)
ADAMW = replace(EVERYTHING, optimizer="adamw", weight_noise=0.2)
IMAGES, LABELS = (tensor[:16] for tensor in striped_data()[0].tensors)
PATHS = ("lpt_peft/recipe/", "lpt_peft/prompts.py", "lpt_peft/adapter.py", "lpt_peft/output.py", "lpt_peft/heads.py")


class Scripted(NoiseFreeLoss):
    """The objective, with its value or gradient multiplied by a factor in given calls."""

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
        criterion=criterion or NoiseFreeLoss(PHASE.epochs),
        steps=steps,
        accelerator=accelerator,
        check_every=check_every,
        **options,
    )
    return adapter, run


def complete_state(adapter, run):
    """Parameters, usage, momentum and average, and the numbers of a checkpoint."""
    tensors, numbers = run.state()
    return {**result_of(adapter), **{name: tensor.clone() for name, tensor in tensors.items()}}, numbers


@pytest.mark.parametrize("phase", ["shared", "group", "joint"])
@pytest.mark.parametrize("settings", [SETTINGS, EVERYTHING, ADAMW])
def test_a_step_reads_nothing_from_the_device(phase, settings):
    """Forward, loss, backward, update and average; the checks of the loss itself are not counted."""
    _, run = phase_run(phase, settings)
    for _ in range(3):
        with count_host_reads() as reads:
            run.training_step(IMAGES, LABELS)
        assert not [line for line in reads.locations if any(path in line for path in PATHS)]
    with count_host_reads() as reads:
        run.check()
    assert len(reads) == 1, "a single process reads a single flag"


@pytest.mark.parametrize("scaler", [None, GradScaler("cpu", init_scale=1.0, growth_interval=10**6)])
def test_a_complete_step_with_a_plain_loss_reads_nothing(scaler):
    def criterion(output, target, epoch):
        return torch.nn.functional.cross_entropy(output.logits, target) + (1 - output.similarity).mean()

    _, run = phase_run(criterion=criterion, scaler=scaler)
    for _ in range(2):
        with count_host_reads() as reads:
            run.training_step(IMAGES, LABELS)
        assert not reads.locations


def test_the_counter_counts_host_reads():
    """A condition on a tensor and boolean indexing."""
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
@pytest.mark.parametrize("settings", [EVERYTHING, ADAMW])
def test_a_diverging_step_leaves_the_last_finite_state(settings, criterion, words):
    """Read eleven steps later: neither the diverging step nor the finite steps after it changed anything."""
    adapter, run = phase_run(settings=settings)
    for _ in range(2):
        run.training_step(IMAGES, LABELS)
    finite = complete_state(adapter, run)
    adapter, run = phase_run(settings=settings, criterion=Scripted(**criterion))
    for _ in range(13):
        run.training_step(IMAGES, LABELS)
    with pytest.raises(StateError, match=words):
        run.check()
    with pytest.raises(StateError, match=words):
        run.state()
    run._divergence = DivergenceFlag(torch.device("cpu"))  # to read the state that would have been saved
    state, numbers = complete_state(adapter, run)
    assert same(state, finite[0])
    assert numbers == {**finite[1], "learning_rate": numbers["learning_rate"]}
    assert numbers["step"] == 2


@pytest.mark.parametrize("check_every", [1, 3])
def test_the_flag_is_read_at_the_given_interval(check_every):
    _, run = phase_run(criterion=Scripted(value={2: math.nan}), check_every=check_every)  # in step 1
    for _ in range(max(1, check_every - 1)):
        run.training_step(IMAGES, LABELS)
    with pytest.raises(StateError, match="in step 1 "):
        run.training_step(IMAGES, LABELS)


def test_the_flag_is_read_at_the_end_of_an_epoch():
    _, run = phase_run(criterion=Scripted(value={2: math.nan}), steps=4)
    for _ in range(3):
        run.training_step(IMAGES, LABELS)
    with pytest.raises(StateError, match=r"in step 1 \(epoch 0\)"):
        run.training_step(IMAGES, LABELS)


def test_steps_do_not_depend_on_when_they_are_checked():
    states = []
    for check_every in (1, 16):
        adapter, run = phase_run(check_every=check_every)
        for _ in range(5):
            run.training_step(IMAGES, LABELS)
        states.append(complete_state(adapter, run))
    assert same(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def test_a_single_process_stops_without_a_device_read():
    _, run = phase_run()
    run.training_step(IMAGES, LABELS, lambda: False)
    assert not run.stopped
    run.training_step(IMAGES, LABELS, lambda: True)
    assert run.stopped


@pytest.mark.parametrize("settings", [EVERYTHING, ADAMW])
def test_a_scaled_loss_trains_as_an_unscaled_loss(settings):
    """A scale that is a power of two changes no bit; an overflow is skipped, and the scale halves."""
    states = []
    for scaler in (None, GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)):
        adapter, run = phase_run(settings=settings, scaler=scaler)
        for _ in range(3):
            run.training_step(IMAGES, LABELS)
        states.append(complete_state(adapter, run)[0])
    assert same(*states)
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    adapter, run = phase_run(settings=replace(settings, average=None), criterion=Scripted(gradient={0: math.inf}))
    run._accelerator.scaler = scaler
    before = result_of(adapter)
    run.training_step(IMAGES, LABELS)
    run.check()
    after = result_of(adapter)
    assert all(torch.equal(after[name], before[name]) for name in adapter.adapter_state_dict())
    tensors = {name: tensor for name, tensor in run.state()[0].items() if name != "usage"}
    assert tensors
    assert not any(bool(tensor.any()) for tensor in tensors.values()), "the state of the optimizer is still zero"
    assert scaler.get_scale() == 2.0**9
    run.training_step(IMAGES, LABELS)
    run.check()
    assert not torch.equal(adapter.pool.prompts, before["pool.prompts"])


def test_a_scaled_loss_that_is_nan_stops_the_run():
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    adapter, run = phase_run(criterion=Scripted(value={2: math.nan}), scaler=scaler)
    run.training_step(IMAGES, LABELS)
    finite = result_of(adapter)
    for _ in range(3):
        run.training_step(IMAGES, LABELS)
    with pytest.raises(StateError, match="The loss became nan in step 1"):
        run.check()
    assert same(result_of(adapter), finite), "later steps are skipped although their gradients are finite"


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 4, 3)])
def test_decay_of_selected_groups_by_boolean_indexing(shape):
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
    parameter.grad = torch.randn(shape, generator=generator)
    parameter.grad[[1, 3]] = 0
    expected = parameter.grad.clone()
    selected = torch.tensor([True, False, True, False, True])
    expected[selected] += 0.1 * parameter.detach()[selected]
    with count_host_reads() as reads:
        decay_selected(parameter, 0.1)
    assert torch.equal(parameter.grad, expected)
    assert not reads


def late_reads(folder):
    """A stop and a NaN on rank 1 are read at every third step, as on a GPU; epochs have eight steps."""
    rank = int(os.environ["RANK"])
    dataset, labels = striped_data()
    phase = replace(PHASE, epochs=2)
    settings = replace(SETTINGS, batch_size=8, shared=phase, group=replace(PHASE, epochs=0), save_every=1000)

    def run(criterion, name):
        adapter = tiny_adapter(head_dropout=0.0)
        train(adapter, dataset, labels, settings, criterion=criterion, checkpoints=folder / name, progress=False)
        return result_of(adapter)

    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)

    original = PhaseRun.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseRun, "__init__", functools.partialmethod(original, check_every=3))
        with pytest.raises(KeyboardInterrupt) as stopped:
            run(FailingLoss(4 if rank == 1 else None, terminate, epochs=2), "run")
        names = [path.name for path in checkpoints(folder / "run")]
        resumed = run(FailingLoss(epochs=2), "run")
        expected = run(FailingLoss(epochs=2), "uninterrupted")
        with pytest.raises(StateError) as diverged:
            run(Scripted(value={4: math.nan} if rank == 1 else {}), "diverged")
    return str(stopped.value), names, same(resumed, expected), str(diverged.value), checkpoints(folder / "diverged")


def test_processes_read_a_stop_and_a_nan_of_another_process_at_the_same_later_step(tmp_path):
    for stopped, names, resumed, diverged, saved in run_ranks(late_reads, tmp_path, init=False):
        assert stopped.startswith("stopped after step 6 of phase shared, saved as"), "requested in step 5"
        assert names == ["1-shared-00000006"]
        assert resumed
        assert diverged.startswith("The loss became nan in step 4 (epoch 0) of phase shared")
        assert not saved
