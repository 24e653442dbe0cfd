"""lpt-peft predict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpt_peft.cli import main
from tests.cli.runs import NAMES, load_adapter


def test_predict_names_classes(run, data, capsys):
    images = [str(data / "test" / name / "0.png") for name in NAMES]
    assert main(["predict", str(run), *images, "--json", "--show", "2"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["image"] for answer in answers] == images
    assert all(len(answer["classes"]) == 2 for answer in answers)
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(image))) for image in images]).permute(0, 3, 1, 2)
    expected = load_adapter(run / "prompts").eval()(pixels / 127.5 - 1).softmax(1)  # 32 px, mean and std 0.5
    for answer, probabilities in zip(answers, expected, strict=True):
        best = probabilities.argsort(descending=True).tolist()[:2]
        assert [entry["class"] for entry in answer["classes"]] == [NAMES[label] for label in best]
        assert [entry["label"] for entry in answer["classes"]] == best
        found = [entry["probability"] for entry in answer["classes"]]
        assert found == pytest.approx([probabilities[label].item() for label in best], abs=1e-5)
    assert main(["predict", str(run), *images]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [answer["classes"][0]["class"] for answer in answers]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "RUN", "broken.png"], "broken.png: UnidentifiedImageError: cannot identify image file"),
        (["predict", "RUN", "nowhere.png"], "nowhere.png: FileNotFoundError: No such file or directory"),
        (["predict", "RUN", "nowhere.png", "--show", "4"], "--show 4 must be from 1 to 3"),
        (["predict", "nowhere", "nowhere.png", "--show", "0"], "--show 0 must be at least 1"),
        (["predict", "RUN"], "needs images"),
        (["predict", "nowhere", "a.png"], "nowhere"),
    ],
)
def test_errors(run, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_text("not an image")
    assert main([word.replace("RUN", str(run)) for word in words]) == 1
    streams = capsys.readouterr()
    assert message in streams.err
    assert streams.out == ""
