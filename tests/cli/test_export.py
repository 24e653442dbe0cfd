"""lpt-peft export."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lpt_peft.cli import main
from tests.cli.runs import NAMES, load_adapter


def images_of(data):
    """The test images of the run (9, 3, 32, 32): 32 px, mean and std 0.5."""
    files = [data / "test" / name / f"{number}.png" for name in NAMES for number in range(3)]
    pixels = np.stack([np.array(Image.open(file)) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def test_two_runs_share_an_onnx_graph(run, data, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    for name in ("first", "second"):
        shutil.copytree(run, tmp_path / name)
    other = load_adapter(run / "prompts")
    with torch.no_grad():
        other.head.weight.copy_(other.head.weight.flip(0))
        other.shared.prompts.add_(0.1)
    other.save_pretrained(tmp_path / "second" / "prompts")
    words = ["export", str(tmp_path / "first"), str(tmp_path / "second"), "--swappable", "--json"]
    assert main([*words, "--output", str(tmp_path / "bank")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tasks"] == ["first", "second"]
    assert result["deviation"] < 1e-4
    session = onnxruntime.InferenceSession(result["file"])
    images = images_of(data)
    for name in ("first", "second"):
        model = load_adapter(tmp_path / name / "prompts").eval()
        output = model(images, return_output=True)
        arrays = np.load(tmp_path / "bank" / "tasks" / f"{name}.npz")
        logits, _, groups = session.run(None, {"images": images.numpy(), **arrays})
        np.testing.assert_allclose(logits, output.logits.detach(), atol=1e-4 * float(output.logits.abs().max()))
        np.testing.assert_array_equal(groups, output.groups)
        about = json.loads((tmp_path / "bank" / "tasks" / f"{name}.json").read_text("utf-8"))
        assert about["class_names"] == NAMES
        assert about["temperature"] == model.metadata.temperature
        assert about["preprocess"]["crop_pct"] == 1


def test_a_run_is_exported_into_its_folder(run, data, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--format", "pt2"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    file = tmp_path / "run" / "export" / "model.pt2"
    assert first.startswith(f"{file}: logits differ by ")
    assert others == ["inputs   images", "outputs  logits, probabilities, groups"]
    images = images_of(data)
    model = load_adapter(run / "prompts").eval()
    expected = model(images)
    logits, probabilities, _ = torch.export.load(file).module()(images)
    torch.testing.assert_close(logits, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    torch.testing.assert_close(probabilities, (expected / model.metadata.temperature).softmax(1), atol=1e-3, rtol=0)
    assert json.loads((file.parent / "model.json").read_text("utf-8"))["class_names"] == NAMES
    assert main(["export", str(tmp_path / "run"), "--format", "pt2"]) == 1
    assert "exists already: give the path of a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "other"], "other is a further task, which needs --swappable"),
        (["RUN", "RUN", "--swappable"], "Two tasks have the name"),
        (["nowhere"], "nowhere does not exist"),
        (["RUN", "--output", "~nobody/export"], "the home directory ~nobody is unknown"),
        (["RUN", "nowhere", "--swappable", "--output", "bank"], "nowhere does not exist"),
        (["RUN", "--device", "cuda", "--output", "bank"], 'is for format="aoti"'),
    ],
)
def test_errors(run, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *(word.replace("RUN", str(run)) for word in words)]) == 1
    streams = capsys.readouterr()
    assert message in streams.err
    assert streams.out == ""
    assert list(tmp_path.iterdir()) == []
