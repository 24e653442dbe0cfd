"""Accelerate's states, loaders and options with an adapter, on one process and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("lightning")
from accelerate.data_loader import skip_first_batches  # noqa: E402

from lpt_peft import DualSampler, LPTLoss  # noqa: E402
from tests.clients.two_processes import HALF, LABELS, build, loader, numbers  # noqa: E402

ROOT = Path(__file__).parents[2]
OWN = {"shared.prompts", "pool.prompts", "pool.keys", "pool.usage", "head.weight", "phase_index", "block_k_query"}
phases = pytest.mark.parametrize("phase", ["shared", "group"])
pytestmark = pytest.mark.filterwarnings("ignore:.*weights_only.*")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.clients.two_processes", str(folder)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def drawn(num_replicas, rank):
    return list(DualSampler(LABELS, 2 * HALF, num_replicas=num_replicas, rank=rank))


@pytest.mark.parametrize("rank", [0, 1])
def test_loader_without_prepare_has_the_share_of_its_rank(ranks, rank):
    assert ranks[rank]["unprepared"] == drawn(2, rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_prepare_distributes_batches_of_the_same_draw(ranks, rank):
    """DualSampler(..., num_replicas=1, rank=0) in a loader that Accelerate prepares."""
    whole = drawn(1, 0)
    whole += whole[: len(whole) % 2]  # Accelerate fills the last step like this
    assert ranks[rank]["dealt"] == whole[rank::2]
    assert ranks[rank]["dealt, resumed"] == whole[rank::2][2:]


def test_prepare_splits_the_share_of_a_rank_again(ranks):
    """The docs advise against it: half of each rank's batches are dropped."""
    for rank in range(2):
        own = drawn(2, rank)
        assert ranks[rank]["prepared"][: len(own) // 2] == own[rank::2][: len(own) // 2]
        assert len(ranks[rank]["prepared"]) == -(-len(own) // 2)


@phases
def test_load_state_keeps_the_phase_on_two_processes(ranks, phase):
    for found in ranks:
        assert found[f"phase {phase}"] == phase
        assert found[f"logits {phase}"]


def test_lightning_refuses_to_replace_the_sampler(ranks):
    for found in ranks:
        assert "use_distributed_sampler=False" in found["lightning"]


def train(folder, phase, steps, resume=None, accelerator_options=None):
    """Some steps of one epoch; the accelerator's state is saved before step 3."""
    accelerator = accelerate.Accelerator(cpu=True, **(accelerator_options or {}))
    adapter, batches = build(phase).train(), loader()
    images = torch.randn(len(LABELS), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    criterion, target = LPTLoss([30, 12, 6], epochs=1), torch.tensor(LABELS)
    optimizer = torch.optim.SGD(adapter.trainable_parameters(), lr=0.02, momentum=0.9)
    model, optimizer = accelerator.prepare(adapter, optimizer)
    accelerator.register_for_checkpointing(batches.batch_sampler)
    torch.manual_seed(0)
    if resume is not None:
        accelerator.load_state(resume)
    for number, (chosen,) in enumerate(batches, 0 if resume is None else 3):
        with accelerator.accumulate(model):
            accelerator.backward(criterion(model(images[chosen], return_output=True), target[chosen]))
            optimizer.step()
            optimizer.zero_grad()
        if number == 2:
            accelerator.save_state(folder)
        if number == steps - 1:
            break
    return adapter


@phases
def test_resume_in_an_epoch_is_exact(tmp_path, phase):
    """register_for_checkpointing(sampler) keeps the position, load_state the phase, the optimizer and the noise."""
    whole = train(tmp_path, phase, 6)
    names = set(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert names == OWN
    resumed = train(tmp_path / "again", phase, 6, resume=tmp_path)
    for name, tensor in resumed.adapter_state_dict().items():
        assert torch.equal(tensor, whole.adapter_state_dict()[name]), name


def test_skip_first_batches():
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(loader())
    assert numbers(prepared) == drawn(1, 0), "one process: prepared or not is the same"
    assert numbers(skip_first_batches(loader(), 2)) == drawn(1, 0)[2:]


@phases
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"mixed_precision": "bf16"}, 5e-2), ({"dynamo_backend": "eager"}, 1e-5)],
    ids=["bf16", "compile"],
)
def test_options(tmp_path, phase, options, tolerance):
    torch._dynamo.reset()
    plain = train(tmp_path, phase, 2)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        changed = train(tmp_path, phase, 2, accelerator_options=options)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    for name, tensor in changed.adapter_state_dict().items():
        torch.testing.assert_close(tensor, plain.adapter_state_dict()[name], rtol=0, atol=tolerance, msg=name)
