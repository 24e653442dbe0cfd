"""lpt-peft export."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpt_peft.cli import main
from lpt_peft.inference.source import load_model
from tests.cli.runs import NAMES, load_adapter


def images_of(folder):
    """The images of a folder (N, 3, 32, 32): 32 px, mean and std 0.5."""
    pixels = np.stack([np.array(Image.open(file)) for file in sorted(folder.rglob("*.png"))])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def check_results(model, found, images):
    """Compare logits, probabilities and, if there are any, groups with those of a model in eval mode."""
    with torch.no_grad():
        output = model(images, return_output=True)
    logits, probabilities, *groups = map(torch.as_tensor, found)
    torch.testing.assert_close(logits, output.logits, atol=1e-4 * float(output.logits.abs().max()), rtol=0)
    expected = (output.logits / (model.metadata.temperature or 1)).softmax(1)
    torch.testing.assert_close(probabilities, expected, atol=1e-3, rtol=0)
    assert [group.tolist() for group in groups] == ([output.groups.tolist()] if model.phase == "group" else [])


def test_two_runs_share_an_onnx_graph(pair_run, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for name in ("first", "second"):
        shutil.copytree(pair_run, tmp_path / name)
    other = load_model(pair_run)
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
    images = images_of(pair_run.parent / "data")
    for name in ("first", "second"):
        with np.load(tmp_path / "bank" / "tasks" / f"{name}.npz") as arrays:
            found = session.run(None, {"images": images.numpy(), **arrays})
        check_results(load_model(tmp_path / name), found, images)
        about = json.loads((tmp_path / "bank" / "tasks" / f"{name}.json").read_text("utf-8"))
        assert about["class_names"] == ["été", "日本"]
        assert about["preprocess"]["crop_pct"] == 1


def test_a_run_is_exported_into_its_folder(run, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)  # which is only for training
    shutil.copytree(run, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--format", "pt2"]) == 0
    streams = capsys.readouterr()
    first, *others = streams.out.splitlines()
    file = tmp_path / "run" / "export" / "model.pt2"
    assert first.startswith(f"{file}: logits differ by ")
    assert others == ["inputs   images", "outputs  logits, probabilities, groups"]
    assert streams.err.splitlines() == [
        "lpt-peft: tracing VisionTransformer",
        "lpt-peft: writing the program",
        "lpt-peft: comparing the file with the model",
    ]
    images = images_of(data / "test")
    model = load_adapter(run / "prompts").eval()
    assert model.metadata.temperature not in (None, 1.0), "fitted on the validation split"
    with torch.no_grad():
        check_results(model, torch.export.load(file).module()(images), images)
    description = json.loads((file.parent / "model.json").read_text("utf-8"))
    assert description["class_names"] == NAMES
    assert description["preprocess"]["crop_pct"] == 1
    assert description["route"] == "exact"
    assert main(["export", str(tmp_path / "run"), "--format", "pt2"]) == 1
    assert "exists already: give the path of a new folder" in capsys.readouterr().err


@pytest.mark.nightly
def test_the_router_of_a_prompt_file(run, data, tmp_path, capsys):
    images = images_of(data / "test")
    model = load_model(run)
    model.fit_router(images, progress=False)
    shutil.copytree(run, tmp_path / "run")
    model.save_pretrained(tmp_path / "run" / "prompts")
    words = ["export", str(tmp_path / "run"), "--format", "pt2", "--route", "router", "--json"]
    assert main(words) == 0
    file = Path(json.loads(capsys.readouterr().out)["file"])
    assert json.loads((file.parent / "model.json").read_text("utf-8"))["route"] == "router"
    model.route = "router"
    with torch.no_grad():
        check_results(model, torch.export.load(file).module()(images), images)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "other"], "other is a further task, which needs --swappable"),
        (["RUN", "RUN", "--swappable"], "Two tasks have the name"),
        (["nowhere"], "nowhere does not exist"),
        (["owner/name"], "owner/name is no folder here: give --output FOLDER"),
        (["RUN", "--output", "~nobody/export"], "the home directory ~nobody is unknown"),
        (["RUN", "nowhere", "--swappable", "--output", "bank"], "nowhere does not exist"),
        (["RUN", "--device", "meta", "--output", "bank"], 'is for format="aoti"'),
        (["RUN", "--device", "abacus", "--output", "bank"], "device='abacus' is not available"),
        (["RUN", "--route", "router", "--output", "bank"], "route='router' needs a router"),
    ],
)
def test_errors(run, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *(word.replace("RUN", str(run)) for word in words)]) == 1
    streams = capsys.readouterr()
    assert message in streams.err
    assert streams.out == ""
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(pair_run, tmp_path, capsys, monkeypatch):
    from lpt_peft.inference import export_model  # noqa: PLC0415

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[export_model.__module__], "write_pt2", interrupted)
    assert main(["export", str(pair_run), "--format", "pt2", "--output", str(tmp_path / "bank")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
