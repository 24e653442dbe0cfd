"""Two gloo processes equal a single process: the same prompts from half the batch each, and the same metrics."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lpt_peft import ShotMetrics
from lpt_peft.errors import ConfigError, StateError
from lpt_peft.recipe import evaluate, find_learning_rate, make_accelerator, train
from lpt_peft.recipe.loading.batches import batches
from lpt_peft.recipe.parallel import average_gradients, gather_strided
from tests.processes import run_ranks
from tests.recipe.tiny import (
    COUNTS,
    PHASE,
    SETTINGS,
    STEPS_PER_EPOCH,
    NoiseFreeLoss,
    RandomlyScaled,
    result_of,
    striped_data,
    tiny_adapter,
)

CHANGES = {
    "plain": {},
    "everything": {"accumulate": 2, "clip_norm": 0.5, "decay": "selected", "average": 0.9},
    "adamw": {"optimizer": "adamw", "weight_noise": 0.2, "decay": "selected", "accumulate": 2},
    "cross-entropy": {"loss": "cross_entropy", "sampling": "instance"},
}
SIZES = (1, 7, 31)


def double_precision_run(change):
    settings = replace(SETTINGS, **CHANGES[change])
    dataset, labels = striped_data(dtype=torch.float64)
    adapter = tiny_adapter(torch.float64, head_dropout=0.0)
    history = train(
        adapter,
        RandomlyScaled(dataset),
        labels,
        settings,
        validation=striped_data(1, torch.float64)[0],
        criterion=NoiseFreeLoss(PHASE.epochs) if settings.loss == "lpt" else None,
        progress=False,
    )
    assert all(parameter.grad is None for parameter in adapter.vit.parameters())
    return result_of(adapter), history


def sizes_of_reductions():
    """Elements of every all-reduce, and those expected: in each step gradients, loss and stop flag."""
    sizes, original = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dataset, labels = striped_data()
    adapter = tiny_adapter()
    settings = replace(SETTINGS, shared=replace(PHASE, epochs=1), group=replace(PHASE, epochs=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        train(adapter, dataset, labels, settings, progress=False)
    head = adapter.head.weight.numel()
    shared = adapter.shared.prompts.numel() + head + 2
    group = sum(parameter.numel() for parameter in adapter.pool.parameters()) + head + 2
    usage = [4]  # of four groups, once per phase
    return sizes, [shared] * STEPS_PER_EPOCH + usage + [group] * STEPS_PER_EPOCH + usage


def run_from_different_parameters():
    rank = int(os.environ["RANK"])
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    train(adapter, dataset, labels, replace(SETTINGS, init_keys="random"), progress=False)
    return adapter.state_dict()


def evaluations():
    """Results of every size, with the images shared and alone."""
    dataset, _ = striped_data()
    adapter = tiny_adapter().eval()
    results = {}
    for size in SIZES:
        split = torch.utils.data.Subset(dataset, range(31 - size, 31))
        shared = evaluate(adapter, split, ShotMetrics(COUNTS), distributed=True)
        results[size] = shared, evaluate(adapter, split, ShotMetrics(COUNTS))
    return results


def learning_rates():
    """Losses of a learning-rate range test."""
    dataset, labels = striped_data(dtype=torch.float64)
    adapter = tiny_adapter(torch.float64, head_dropout=0.0)
    criterion = NoiseFreeLoss(PHASE.epochs)
    return find_learning_rate(adapter, dataset, labels, SETTINGS, steps=20, criterion=criterion, progress=False).losses


def refusals():
    dataset, labels = striped_data()
    with pytest.raises(ConfigError) as uneven:
        train(tiny_adapter(), dataset, labels, replace(SETTINGS, batch_size=14), progress=False)
    images = dataset.tensors[0] if os.environ["RANK"] == "0" else dataset.tensors[0] * float("nan")
    broken = torch.utils.data.TensorDataset(images, torch.tensor(labels))
    with pytest.raises(StateError) as diverged:
        train(tiny_adapter(), broken, labels, SETTINGS, progress=False)
    return str(uneven.value), str(diverged.value)


def random_numbers_of_steps():
    drawn = []

    def criterion(output, target, epoch):
        drawn.append(float(torch.rand(())))
        return torch.nn.functional.cross_entropy(output.logits, target)

    dataset, labels = striped_data()
    train(tiny_adapter(), dataset, labels, SETTINGS, criterion=criterion, progress=False)
    return drawn


def communication():
    """Gathered rows of 7 in all, and the mean of gradients and scalars."""
    rank = int(os.environ["RANK"])
    accelerator = make_accelerator(SETTINGS)
    rows = torch.arange(14.0).reshape(7, 2)
    share = torch.cat([rows, torch.full((1, 2), -1.0)])[rank::2]
    gradients = [torch.full((2, 3), float(rank)), torch.tensor(4.0 * rank)]
    scalars = average_gradients(accelerator, gradients, [torch.tensor(10.0 * rank)])
    return gather_strided(accelerator, share, 7), gradients, scalars


def error_of_the_first_rank(folder):
    """A checkpoint that only the first process writes, on a full disk."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    dataset, labels = striped_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StateError) as error:
            train(tiny_adapter(), dataset, labels, SETTINGS, checkpoints=folder, progress=False)
    return str(error.value)


def printed_output():
    """What a run prints on stderr."""
    stream = io.StringIO()
    dataset, labels = striped_data()
    settings = replace(SETTINGS, shared=replace(PHASE, epochs=2), group=replace(PHASE, epochs=0))
    with contextlib.redirect_stderr(stream):
        train(tiny_adapter(), dataset, labels, settings)
    return stream.getvalue()


def all_scenarios(folder):
    """Everything that two processes do in this file, so that they start once."""
    return {
        "runs": {change: double_precision_run(change) for change in CHANGES},
        "sizes": sizes_of_reductions(),
        "different": run_from_different_parameters(),
        "evaluations": evaluations(),
        "refusals": refusals(),
        "rates": learning_rates(),
        "random": [random_numbers_of_steps() for _ in range(2)],
        "communication": communication(),
        "error": error_of_the_first_rank(folder),
        "printed": printed_output(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(all_scenarios, tmp_path_factory.mktemp("run"), init=False)


@pytest.mark.parametrize("change", CHANGES)
def test_two_processes_equal_a_single_process(ranks, change):
    (first, history), (second, _) = (rank["runs"][change] for rank in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first), "the ranks differ"
    expected, expected_history = double_precision_run(change)
    assert torch.equal(first["usage"], expected["usage"]), "usage counts all images"
    assert int(first["usage"].sum()) == 2 * 16 * PHASE.epochs * STEPS_PER_EPOCH
    for name, tensor in expected.items():
        tolerance = 1e-7 if change == "adamw" else 1e-10  # AdamW divides by square roots of tiny numbers
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=tolerance, msg=name)
    for record, expected_record in zip(history, expected_history, strict=True):
        assert record["loss"] == pytest.approx(expected_record["loss"], abs=tolerance)
        assert record["validation"] == expected_record["validation"]


def test_two_processes_find_the_same_learning_rate(ranks):
    first, second = (rank["rates"] for rank in ranks)
    assert first == second
    assert first == pytest.approx(learning_rates(), abs=1e-9)


def test_only_trained_parameters_are_communicated(ranks):
    for rank in ranks:
        sizes, expected = rank["sizes"]
        assert sizes == expected


def test_processes_with_different_parameters_start_from_those_of_the_first(ranks):
    first, second = (rank["different"] for rank in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("size", SIZES)
def test_every_image_is_evaluated_once(ranks, size):
    for rank in ranks:
        shared, alone = rank["evaluations"][size]
        assert shared == alone
        assert shared.num_images == size


def test_gathered_rows_and_mean_gradients(ranks):
    for rank in ranks:
        rows, gradients, scalars = rank["communication"]
        assert torch.equal(rows, torch.arange(14.0).reshape(7, 2))
        assert torch.equal(gradients[0], torch.full((2, 3), 0.5))
        assert (float(gradients[1]), scalars.tolist()) == (2.0, [5.0])


def test_an_error_of_the_first_process_ends_all(ranks):
    for rank in ranks:
        assert "cannot be written: No space left on device. There is no earlier checkpoint" in rank["error"]


def test_only_the_main_process_prints(ranks):
    first, second = (rank["printed"] for rank in ranks)
    assert first.count("epoch 2/2") == 1
    assert "2 processes, 0 loading workers each" in first
    assert not second


def test_a_batch_that_cannot_be_divided_is_refused(ranks):
    for rank in ranks:
        assert "batch_size=14 cannot be divided evenly: two halves, 2 processes" in rank["refusals"][0]


def test_a_nan_loss_on_a_single_process_stops_both(ranks):
    for rank in ranks:
        assert "loss became nan in step 0" in rank["refusals"][1]


def test_random_numbers_differ_between_steps_and_processes_but_not_between_runs(ranks):
    assert all(rank["random"][0] == rank["random"][1] for rank in ranks)
    drawn = [number for rank in ranks for number in rank["random"][0]]
    assert len(set(drawn)) == len(drawn) == 2 * 2 * PHASE.epochs * STEPS_PER_EPOCH


@pytest.mark.parametrize("sampling", ["dual", "instance"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shares_make_up_the_complete_batch_from_any_step(sampling, processes):
    """The rows of all ranks, joined half by half, are those of a single process."""
    _, labels = striped_data()
    numbered = torch.utils.data.TensorDataset(torch.arange(31.0), torch.tensor(labels))
    settings = replace(SETTINGS, sampling=sampling, loss="lpt" if sampling == "dual" else "cross_entropy")

    def rows(start, **ranks):
        return [images for images, _ in batches(numbered, labels, settings, "shared", epochs=3, start=start, **ranks)]

    complete = rows(0)
    assert len(complete) == 3 * STEPS_PER_EPOCH
    assert all(len(batch) == settings.batch_size for batch in complete)
    shares = zip(*(rows(0, num_replicas=processes, rank=rank) for rank in range(processes)), strict=True)
    for step, parts in enumerate(shares):
        halves = [torch.cat([part.chunk(2)[half] for part in parts]) for half in range(2)]
        assert torch.equal(torch.cat(halves), complete[step])
    for start in (1, 4, 7, 11, 12):
        assert [row.tolist() for row in rows(start)] == [row.tolist() for row in complete[start:]]
    if sampling == "instance":
        assert set(torch.cat(complete[:4]).tolist()) == set(range(31)), "every image once before any is repeated"
    assert complete[0].tolist() != complete[4].tolist()
