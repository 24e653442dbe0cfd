"""The examples in other libraries' loops, run on stripes; where random draws agree, against the plain loop."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from lpt_peft import LongTailPromptAdapter
from tests.conftest import tiny_vit

EXAMPLES = Path(__file__).parents[2] / "examples"
LABELS = [0] * 30 + [1] * 6 + [2] * 2


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stripes():
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * torch.randn(len(LABELS), 3, 32, 32, generator=generator)
    for image, label in zip(images, LABELS, strict=True):
        image[:, :, 10 * label : 10 * label + 10] += 2
    return images


def run(name, **options):
    """Images, ViT as it was, trained adapter."""
    images, vit = stripes(), tiny_vit()
    frozen = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    module = example(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # these loops draw from torch's default generator, as plain loops do
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
    return {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}


@pytest.fixture(scope="module")
def plain():
    return run("plain_torch")


def assert_close(one, other):
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5, msg=name)


def test_accelerate_is_the_plain_loop(plain):
    assert_close(run("with_accelerate"), plain)


def test_lightning_is_the_plain_loop(plain, tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    assert_close(run("with_lightning", default_root_dir=tmp_path, enable_model_summary=False, **quiet), plain)


def test_trainer_of_transformers(tmp_path):
    pytest.importorskip("transformers", reason='transformers is not installed: pip install "lpt_peft[transformers]"')
    run("hf_trainer", output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, seed=0)


def test_timm():
    run("timm_loop")


@pytest.mark.parametrize("name", ["with_accelerate", "with_lightning", "hf_trainer", "timm_loop"])
def test_ours_are_few_lines(name):
    source = (EXAMPLES / f"{name}.py").read_text().split("if __name__")[0]
    assert 5 <= sum("# LPT" in line for line in source.splitlines()) <= 9
    assert len([line for line in source.splitlines() if line.strip()]) <= 75


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
