"""Tensors and switches of an adapter under other tools: freezing, pruning, parametrization, FSDP, tracing."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from lpt_peft.errors import StateError
from tests.backbones.two_processes import objective
from tests.host_reads import count_host_reads
from tests.sharded_processes import IMAGES, TARGET, build, gradients

ROOT = Path(__file__).parents[1]
phases = pytest.mark.parametrize("phase", ["shared", "group"])


# Parameters that a phase trains


@phases
def test_a_frozen_head_stays_frozen(phase):
    adapter = build()
    adapter.head.requires_grad_(False)
    adapter.phase = phase
    assert not adapter.head.weight.requires_grad
    adapter.head.requires_grad_(True)
    adapter.phase = phase
    assert adapter.head.weight.requires_grad


def test_a_phase_opens_the_head_where_everything_was_frozen():
    adapter = build().requires_grad_(False)
    adapter.phase = "shared"
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["shared.prompts", "head.weight"]


def test_a_phase_drops_the_gradients_of_what_it_freezes():
    adapter = build().train()
    objective(adapter, IMAGES, TARGET).backward()
    head = adapter.head.weight.grad.clone()
    adapter.phase = "shared"
    assert adapter.pool.prompts.grad is None
    assert adapter.pool.keys.grad is None
    assert torch.equal(adapter.head.weight.grad, head)
    objective(adapter, IMAGES, TARGET).backward()
    adapter.phase = "group"
    assert adapter.shared.prompts.grad is None


@phases
def test_a_training_step_reads_nothing_on_the_host(phase):
    adapter = build().train()
    adapter.phase = phase
    with count_host_reads() as reads:
        out = adapter(IMAGES, return_output=True)
        (out.logits.square().sum() + out.similarity.sum()).backward()
    assert not reads, reads.locations


def test_group_prompts_take_the_dtype_of_the_backbone():
    """Shared and group prompts enter the blocks in the dtype in which these compute."""
    adapter = build().train()
    adapter.vit.bfloat16()
    seen: list[torch.dtype] = []
    run = adapter.backbone.run
    adapter.backbone.run = lambda stream, start, prompts: (
        seen.extend(p.dtype for p in prompts) or run(stream, start, prompts)
    )
    adapter(IMAGES.bfloat16())
    assert seen[-1] == torch.bfloat16
    seen.clear()
    adapter.vit.float()
    with torch.autocast("cpu", torch.bfloat16):
        adapter(IMAGES)
    assert seen[-1] == torch.bfloat16


# Tracing


@phases
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace(phase):
    adapter = build().eval()
    adapter.phase = phase
    traced = torch.jit.trace(adapter, IMAGES[:2])
    other = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(traced(other), adapter(other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tensorboard_graph(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(build().eval(), IMAGES)
    assert any(file.stat().st_size > 1000 for file in tmp_path.iterdir())


@phases
@pytest.mark.filterwarnings("ignore")
def test_onnx_by_torchscript(phase):
    onnxruntime = pytest.importorskip("onnxruntime")
    adapter = build().eval()
    adapter.phase = phase
    file = io.BytesIO()
    options = {"input_names": ["images"], "dynamic_axes": {"images": {0: "batch"}}}
    torch.onnx.export(adapter, (IMAGES,), file, dynamo=False, **options)
    session = onnxruntime.InferenceSession(file.getvalue())
    batch = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (got,) = session.run(None, {"images": batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), adapter(batch).detach(), rtol=1e-4, atol=1e-4)


# Pruning and parametrization

OWNERS = {"shared.prompts": "shared", "pool.prompts": "pool", "pool.keys": "pool", "head.weight": "head"}


class Doubled(nn.Module):
    """A parametrization that doubles a tensor."""

    def forward(self, tensor):
        return 2 * tensor

    def right_inverse(self, tensor):
        return tensor / 2


class OneWay(nn.Module):
    """A parametrization without right_inverse."""

    def forward(self, tensor):
        return tensor.sinh()


@phases
@pytest.mark.parametrize("name", OWNERS)
def test_prune(phase, name):
    """A masked tensor computes, trains and is saved as the tensor with zeros."""
    adapter, plain = build().train(), build().train()
    adapter.phase = plain.phase = phase
    owner, leaf = adapter.get_submodule(OWNERS[name]), name.partition(".")[2]
    prune.random_unstructured(owner, leaf, amount=0.4)
    with torch.no_grad():
        plain.get_parameter(name).mul_(getattr(owner, f"{leaf}_mask"))
    torch.testing.assert_close(adapter(IMAGES), plain(IMAGES))
    if not plain.get_parameter(name).requires_grad:
        return
    objective(adapter, IMAGES, TARGET).backward()
    with torch.no_grad():
        getattr(owner, f"{leaf}_orig").sub_(1.0)
        plain.get_parameter(name).sub_(getattr(owner, f"{leaf}_mask"))
    saved = adapter.adapter_state_dict()
    torch.testing.assert_close(saved[name], plain.get_parameter(name).detach())
    twin = build(1)
    twin.load_adapter_state_dict(saved)
    adapter.load_adapter_state_dict(saved)
    assert torch.equal(adapter.adapter_state_dict()[name], twin.adapter_state_dict()[name])
    with pytest.raises(StateError, match=rf"{name} cannot be loaded.*pruned.*prune\.remove"):
        adapter.load_adapter_state_dict({**saved, name: torch.ones_like(saved[name])})


@phases
@pytest.mark.parametrize(
    "name", sorted(OWNERS.keys() - {"pool.keys"})
)  # torch keeps them in a ModuleDict, which has keys()
def test_parametrize(phase, name):
    adapter, plain = build().train(), build().train()
    adapter.phase = plain.phase = phase
    owner, leaf = adapter.get_submodule(OWNERS[name]), name.partition(".")[2]
    before = adapter.adapter_state_dict()
    parametrize.register_parametrization(owner, leaf, Doubled())
    torch.testing.assert_close(adapter(IMAGES), plain(IMAGES))
    torch.testing.assert_close(adapter.adapter_state_dict(), before)
    other = build(1).adapter_state_dict()
    adapter.load_adapter_state_dict(other)
    torch.testing.assert_close(adapter.adapter_state_dict(), other)
    original = owner.parametrizations[leaf].original
    assert original.requires_grad == plain.get_parameter(name).requires_grad
    objective(adapter, IMAGES, TARGET).backward()
    assert not original.requires_grad or original.grad.any()


def test_a_parametrization_without_a_way_back_is_refused_before_anything_is_loaded():
    adapter = build()
    parametrize.register_parametrization(adapter.head, "weight", OneWay())
    before = adapter.adapter_state_dict()
    with pytest.raises(StateError, match=r"head\.weight cannot be loaded.*right_inverse.*remove_parametrizations"):
        adapter.load_adapter_state_dict(build(1).adapter_state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.adapter_state_dict().items())


# FSDP and DDP


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Results of tests/sharded_processes.py, by kind."""

    def run(kind):
        folder = tmp_path_factory.mktemp(kind)
        command = [sys.executable, "-m", "tests.sharded_processes", kind, str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return torch.load(folder / "results.pt", weights_only=True)

    return run


@pytest.mark.slow
def test_fsdp1_trains(sharded):
    got, adapter = sharded("fsdp1"), build().train()
    expected = gradients(adapter, adapter)
    torch.testing.assert_close(got["gradients"], expected)
    torch.testing.assert_close(got["tensors"], adapter.adapter_state_dict())


@pytest.mark.slow
def test_fsdp2_loads_full_tensors_into_shards(sharded):
    got, expected = sharded("fsdp2"), build(1).eval()
    assert got["sharded"]
    assert all(torch.equal(tensor, got["tensors"][name]) for name, tensor in expected.adapter_state_dict().items())
    torch.testing.assert_close(got["logits"], expected(IMAGES).detach())
    assert got["phase"] == "group"
    assert torch.equal(got["again"], got["logits"])


@pytest.mark.slow
def test_ddp_without_unused_parameters_and_one_wrapper_for_each_phase(sharded):
    got = sharded("ddp")
    for phase, other in (("shared", "group"), ("group", "shared")):
        adapter = build().train()
        adapter.phase = phase
        nn.functional.cross_entropy(adapter(IMAGES), TARGET).backward()
        expected = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
        torch.testing.assert_close(got[phase], expected, rtol=1e-4, atol=1e-6)
        sentence = f'built before adapter.phase became "{other}"'
        assert sentence in got[f"used in {phase}"]
        assert "new wrapper for each phase" in got[f"used in {phase}"]
        assert got[f"evaluates after {phase}"]
        assert f'built before adapter.phase became "{phase}"' in got[f"built before {phase}"]
        assert got[f"new in {phase}"] == ""


def test_distributed_tensors_are_not_imported():
    """They take longer to import than this package; timm is kept out because it may import them."""
    program = (
        "import sys, types\n"
        "face = types.ModuleType('lpt_peft')\n"
        f"face.__path__ = [{str(ROOT / 'lpt_peft')!r}]\n"
        "sys.modules['lpt_peft'] = face\n"
        "import torch\n"
        "from lpt_peft._tensors import read_value, write_value\n"
        "from lpt_peft.backbones.fingerprint import fingerprint, versions\n"
        "from lpt_peft.heads import CosineClassifier\n"
        "head = CosineClassifier(4, 2)\n"
        "write_value(head, 'weight', read_value(head, 'weight').detach())\n"
        "fingerprint(head.parameters()), versions(head.parameters())\n"
        "print('torch.distributed.tensor' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
