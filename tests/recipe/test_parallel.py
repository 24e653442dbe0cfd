"""Two gloo processes are one: the same prompts from half the batch each, in both phases, and the same metrics."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from lpt_peft import ShotMetrics
from lpt_peft.errors import ConfigError, StateError
from lpt_peft.recipe import evaluate, train
from lpt_peft.recipe.loading.batches import batches
from tests.recipe.tiny import (
    COUNTS,
    PHASE,
    SETTINGS,
    QuietLoss,
    Shaken,
    in_ranks,
    result_of,
    striped_data,
    tiny_adapter,
)


def whole_run(settings, validation=None):
    dataset, labels = striped_data(dtype=torch.float64)
    adapter = tiny_adapter(torch.float64, head_dropout=0.0)
    criterion = QuietLoss(PHASE.epochs) if settings.loss == "lpt" else None
    history = train(
        adapter,
        Shaken(dataset),
        labels,
        settings,
        validation=validation,
        criterion=criterion,
        progress=False,
    )
    return adapter, history


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"accumulate": 2, "clip_norm": 0.5, "decay": "selected", "average": 0.9},
        {"loss": "cross_entropy", "sampling": "instance"},
    ],
)
def test_two_processes_equal_one(tmp_path, change):
    settings = replace(SETTINGS, **change)
    validation = striped_data(1, torch.float64)[0]

    def one():
        adapter, history = whole_run(settings, validation)
        rank = os.environ["RANK"]
        losses = torch.tensor([[record["loss"], record["validation"]["overall"]] for record in history])
        save_file({**result_of(adapter), "history": losses}, tmp_path / f"{rank}.safetensors")
        assert all(parameter.grad is None for parameter in adapter.vit.parameters())

    assert in_ranks(one) == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "the ranks drifted apart"
    adapter, history = whole_run(settings, validation)
    wanted = result_of(adapter)
    assert torch.equal(first["usage"], wanted["usage"]), "groups are counted over all images"
    assert int(first["usage"].sum()) == 2 * 2 * 8 * PHASE.epochs * (sum(COUNTS) // 8 + 1)
    for name, tensor in wanted.items():
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-10, msg=name)
    losses = torch.tensor([[record["loss"], record["validation"]["overall"]] for record in history])
    torch.testing.assert_close(first["history"], losses)


def test_only_what_is_learnt_travels(tmp_path):
    """Every all-reduce of a step is counted: one vector of gradients, with loss and stop flag behind it."""
    sizes = []
    original = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    def one():
        dist.all_reduce = counted
        dataset, labels = striped_data()
        adapter = tiny_adapter()
        settings = replace(SETTINGS, shared=replace(PHASE, epochs=1), group=replace(PHASE, epochs=1))
        train(adapter, dataset, labels, settings, progress=False)
        head = adapter.head.weight.numel()
        shared = adapter.shared.prompts.numel() + head + 2
        group = sum(p.numel() for p in adapter.pool.parameters()) + head + 2
        assert sizes == [shared] * 4 + [4] + [group] * 4 + [4], sizes  # and the usage of four groups, once a phase

    assert in_ranks(one) == [0, 0]


def test_processes_that_start_apart_go_on_together(tmp_path):
    def one():
        torch.manual_seed(int(os.environ["RANK"]))
        dataset, labels = striped_data()
        adapter = tiny_adapter()
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        train(adapter, dataset, labels, replace(SETTINGS, init_keys="random"), progress=False)
        every = {f"{n}": t for n, t in adapter.state_dict().items()}
        save_file({n: t.contiguous() for n, t in every.items()}, tmp_path / f"{os.environ['RANK']}.safetensors")

    assert in_ranks(one) == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("size", [1, 7, 31])
def test_every_image_is_evaluated_once(size):
    def one():
        dataset, _ = striped_data()
        part = torch.utils.data.Subset(dataset, range(31 - size, 31))
        adapter = tiny_adapter().eval()
        alone = evaluate(adapter, part, ShotMetrics(COUNTS))
        dist.init_process_group("gloo")
        assert evaluate(adapter, part, ShotMetrics(COUNTS), distributed=True) == alone
        assert alone.num_images == size

    assert in_ranks(one) == [0, 0]


@pytest.mark.parametrize("sampling", ["dual", "instance"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shares_make_up_the_whole_and_begin_anywhere(sampling, processes):
    """The rows of all ranks, put together by halves, are those of one process; from any step on."""
    _, labels = striped_data()
    images = torch.arange(31.0)
    told = torch.utils.data.TensorDataset(images, torch.tensor(labels))
    settings = replace(SETTINGS, sampling=sampling, loss="lpt" if sampling == "dual" else "cross_entropy")

    def rows(start, **place):
        return [seen for seen, _ in batches(told, labels, settings, "shared", epochs=3, start=start, **place)]

    whole = rows(0)
    assert len(whole) == 3 * (31 // 8 + 1)
    parts = zip(*(rows(0, num_replicas=processes, rank=rank) for rank in range(processes)), strict=True)
    for step, shares in enumerate(parts):
        halves = [torch.cat([share.chunk(2)[half] for share in shares]) for half in range(2)]
        assert torch.equal(torch.cat(halves), whole[step])
    for start in (1, 4, 7, 11, 12):
        assert [row.tolist() for row in rows(start)] == [row.tolist() for row in whole[start:]]
    if sampling == "instance":
        assert set(torch.cat(whole[:4]).tolist()) == set(range(31)), "every image once before any comes again"
    assert whole[0].tolist() != whole[4].tolist()


def test_a_batch_that_cannot_be_shared_out_is_refused():
    def one():
        dataset, labels = striped_data()
        with pytest.raises(ConfigError, match="batch_size=7 cannot be shared out evenly by 2 processes"):
            train(tiny_adapter(), dataset, labels, replace(SETTINGS, batch_size=7), progress=False)

    assert in_ranks(one) == [0, 0]


def test_a_loss_that_is_nan_on_one_process_stops_both():
    def one():
        dataset, labels = striped_data()
        images = dataset.tensors[0] if os.environ["RANK"] == "0" else dataset.tensors[0] * float("nan")
        broken = torch.utils.data.TensorDataset(images, torch.tensor(labels))
        with pytest.raises(StateError, match="loss became nan in step 0"):
            train(tiny_adapter(), broken, labels, SETTINGS, progress=False)

    assert in_ranks(one) == [0, 0]


def test_dropout_and_noise_are_drawn_anew_everywhere(tmp_path):
    """Every step of every phase on every process has random numbers of its own; the same ones in every run."""

    def draws(name):
        drawn = []

        def criterion(output, target, epoch):
            drawn.append(torch.rand(()))
            return torch.nn.functional.cross_entropy(output.logits, target)

        dataset, labels = striped_data()
        train(tiny_adapter(), dataset, labels, SETTINGS, criterion=criterion, progress=False)
        save_file({"drawn": torch.stack(drawn)}, tmp_path / f"{name}-{os.environ.get('RANK')}.safetensors")

    for name in ("once", "twice"):
        assert in_ranks(lambda name=name: draws(name)) == [0, 0]
    once, twice = (
        torch.cat([load_file(tmp_path / f"{name}-{rank}.safetensors")["drawn"] for rank in range(2)])
        for name in ("once", "twice")
    )
    assert torch.equal(once, twice)
    assert len(once.unique()) == len(once) == 2 * 2 * 16
