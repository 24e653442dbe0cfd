"""lpt-peft predict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpt_peft.cli import main
from lpt_peft.cli.common.load_run import load_run
from lpt_peft.cli.predict import _predictions
from tests.cli.runs import BACKBONE, NAMES, SMALL, load_adapter


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


def test_a_prompt_file_alone_reads_images_as_its_run_did(data, tmp_path, monkeypatch):
    """EXIF orientation, background and crop of the training are in the prompt file."""
    words = ["--background", "0", "128", "255", "--no-exif", *BACKBONE, *SMALL, "--crop-pct", "0.9"]
    assert main(["train", str(data), "--output", str(tmp_path / "run"), *words]) == 0
    prompts = tmp_path / "run" / "prompts"
    recorded = json.loads((prompts / "config.json").read_text())["preprocess"]
    assert (recorded["exif"], recorded["background"], recorded["crop_pct"]) == (False, [0, 128, 255], 0.9)
    run = load_run(tmp_path / "run")
    monkeypatch.setattr("lpt_peft.cli.common.load_run.LongTailPromptAdapter.from_pretrained", load_adapter)
    alone = load_run(prompts)
    for name in ("exif", "background", "crop_pct"):
        assert getattr(alone.images, name) == getattr(run.images, name)
    image = np.zeros((40, 48, 4), dtype=np.uint8)
    image[:20] = [200, 30, 90, 255]  # the rest is transparent
    Image.fromarray(image).save(tmp_path / "image.png")
    answers = [next(iter(_predictions(loaded, [tmp_path / "image.png"], 3))) for loaded in (run, alone)]
    assert answers[0] == answers[1]
    assert answers[0][0]["classes"]
