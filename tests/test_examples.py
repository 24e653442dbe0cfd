"""The example scripts: on striped images against the plain loop, and on two processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from itertools import chain

import pytest
import torch
from torch.utils.data import TensorDataset

from lpt_peft import DualSampler, LongTailPromptAdapter
from tests.clients.example_processes import EPOCHS, EXAMPLES, load_example
from tests.clients.example_processes import LABELS as MANY_LABELS
from tests.conftest import tiny_vit

LABELS = [0] * 30 + [1] * 6 + [2] * 2
LOOPS = ["plain_torch", "timm_loop", "with_accelerate", "with_lightning", "hf_trainer"]
NEEDS = {"with_accelerate": "accelerate", "with_lightning": "lightning", "hf_trainer": "transformers"}


def stripes():
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * torch.randn(len(LABELS), 3, 32, 32, generator=generator)
    for image, label in zip(images, LABELS, strict=True):
        image[:, :, 10 * label : 10 * label + 10] += 2
    return images


def run(name, **options):
    """Train with an example, check what holds for every example, and return the trained tensors."""
    pytest.importorskip(NEEDS.get(name, "torch"))
    images, vit = stripes(), tiny_vit()
    frozen = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    module = load_example(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the loops use torch's default generator
        data = TensorDataset(images, torch.tensor(LABELS))
        model = module.train(vit, data, LABELS, epochs=20, lr=0.06, **options)
    assert isinstance(model, LongTailPromptAdapter)
    assert model.phase == "group"
    assert not model.training
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in vit.state_dict().items())
    hits = model(images).argmax(1) == torch.tensor(LABELS)
    rates = [hits[torch.tensor(LABELS) == label].float().mean() for label in range(3)]
    assert sum(rates) / 3 > 0.8, "balanced accuracy: the largest class alone gives a third"
    assert int(model.pool.usage.sum()) > 0
    return model.adapter_state_dict()


@pytest.fixture(scope="module")
def plain():
    return run("plain_torch")


def assert_close(actual, expected):
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_plain_torch_prints_its_losses(capsys):
    run("plain_torch")
    assert capsys.readouterr().out.count("loss") == 40


def test_accelerate_equals_the_plain_loop(plain):
    assert_close(run("with_accelerate"), plain)


def test_lightning_equals_the_plain_loop(plain, tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    assert_close(run("with_lightning", default_root_dir=tmp_path, enable_model_summary=False, **quiet), plain)


def test_trainer_of_transformers(tmp_path):
    run("hf_trainer", output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, seed=0)


def test_timm():
    run("timm_loop")


@pytest.mark.parametrize(
    ("name", "max_lines"),
    [("plain_torch", 45), ("timm_loop", 60), ("with_accelerate", 45), ("with_lightning", 60), ("hf_trainer", 55)],
)
def test_examples_are_short_and_need_few_lines_of_lpt(name, max_lines):
    source = (EXAMPLES / f"{name}.py").read_text().split("if __name__")[0]
    lines = [line for line in source.splitlines() if line.strip()]
    assert 5 <= sum("# LPT" in line for line in lines) <= 12
    assert len(lines) <= max_lines


# Two processes


def launch(folder, launcher, names):
    """Run examples on two processes with a launcher; return the records of the ranks by example."""
    command = [sys.executable, "-m", *launcher, "-m", "tests.clients.example_processes", str(folder), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=EXAMPLES.parent, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in names}


def check_ranks(ranks):
    """Check that each rank loads its share of the same draw, and that all ranks train the same prompts."""
    for rank, record in enumerate(ranks):
        assert record["world"] == 2
        sampler = DualSampler(MANY_LABELS, 64, num_replicas=2, rank=rank)
        share = []
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            share += chain.from_iterable(sampler)
        assert record["indices"] == share * 2, "both phases"
    first, second = (set(chain.from_iterable(_halves(record["indices"])[: 200 // 64])) for record in ranks)
    assert first
    assert not first & second, "instance-balanced halves of one pass share no image"
    for name, tensor in ranks[0]["tensors"].items():
        assert torch.equal(tensor, ranks[1]["tensors"][name]), name


def _halves(indices):
    """The instance-balanced half of each batch."""
    return [indices[start : start + 32] for start in range(0, len(indices), 64)]


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Without accelerators, --multi_gpu starts the processes and the example chooses gloo.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        (TORCHRUN, ["plain_torch", "timm_loop"]),
        (TORCHRUN, ["with_lightning"]),
        (TORCHRUN, ["hf_trainer"]),
        (ACCELERATE, ["with_accelerate"]),
    ],
    ids=lambda value: "-".join(value) if value[0] in LOOPS else value[0].partition(".")[0],
)
def test_two_processes_train_on_different_images(tmp_path, launcher, names):
    for name in names:
        pytest.importorskip(NEEDS.get(name, "torch"))
    for ranks in launch(tmp_path, launcher, names).values():
        check_ranks(ranks)


# Benchmarks


@pytest.mark.nightly
def test_the_benchmark_of_a_step_runs(capsys, monkeypatch):
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")  # as for a script there
    spec = importlib.util.spec_from_file_location("train_step", EXAMPLES / "benchmarks" / "train_step.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_step"] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
        with torch.random.fork_rng(devices=[]):
            module.main(module.Settings(model="vit_tiny_patch16_224", batch_size=2, img_size=32, rounds=1))
    finally:
        del sys.modules["train_step"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == list(module.NAMES)
    assert "1.00" in lines[2]
