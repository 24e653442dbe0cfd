"""The scripts that users copy, run on tiny data."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from lpt_peft import LongTailPromptAdapter
from tests.conftest import tiny_vit

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_torch(capsys):
    labels = [0] * 30 + [1] * 6 + [2] * 2
    torch.manual_seed(0)  # the example draws from torch's default generator, as plain loops do
    images = torch.randn(38, 3, 32, 32) * 0.3
    for image, label in zip(images, labels, strict=True):
        image[:, :, 10 * label : 10 * label + 10] += 2
    vit = tiny_vit()
    frozen = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    model = load_example("plain_torch").train(
        vit, TensorDataset(images, torch.tensor(labels)), labels, epochs=20, lr=0.06
    )
    assert isinstance(model, LongTailPromptAdapter)
    assert model.phase == "group"
    assert (model(images).argmax(1) == torch.tensor(labels)).float().mean() > 0.8
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in vit.state_dict().items())
    assert capsys.readouterr().out.count("loss") == 40


def test_plain_torch_is_short_and_ours_in_few_lines():
    """About forty lines of loop, of which only the marked ones are ours."""
    source = (EXAMPLES / "plain_torch.py").read_text().split("if __name__")[0]
    ours = [line for line in source.splitlines() if line.rstrip().endswith("# LPT")]
    assert len([line for line in source.splitlines() if line.strip()]) <= 45
    assert len(ours) <= 7
