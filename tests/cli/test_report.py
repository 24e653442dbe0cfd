"""lpt-peft report."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import Annotated

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft.cli import main
from lpt_peft.cli.common.run_settings import ImageSettings, PromptSettings, RunSettings
from lpt_peft.cli.common.train_words import train_words
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from tests.cli.runs import BACKBONE, write_images


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_a_run_is_analysed_first_and_reported(copied, capsys):
    assert main(["report", str(copied), "--max-images", "9", "--max-variant-images", "6"]) == 0
    output = capsys.readouterr()
    assert "is analysed first" in output.err
    assert f"Written to {copied}/report.html" in output.out
    analysis = json.loads((copied / "analysis" / "analysis.json").read_text())
    assert analysis["data"]["feature_images"] == 9
    page = (copied / "report.html").read_text("utf-8")
    mistakes = 15 - sum(analysis["classes"]["correct"])
    assert page.count("data:image/jpeg") == mistakes
    assert "lpt-peft train" in page
    assert main(["report", str(copied), "--json"]) == 0
    output = capsys.readouterr()
    assert "is analysed first" not in output.err
    found = json.loads(output.out)
    assert found["report"] == str(copied / "report.html")
    assert found["bytes"] == (copied / "report.html").stat().st_size


def test_without_an_analysis(copied, data, tmp_path, capsys):
    assert main(["report", str(copied), str(data), "--no-analysis", "--output", str(tmp_path / "page.html")]) == 0
    err = capsys.readouterr().err
    assert "left out: features: it needs passes over images" in err
    assert not (copied / "analysis").exists()
    page = (tmp_path / "page.html").read_text("utf-8")
    results = json.loads((copied / "results.json").read_text())["test"]
    assert f"{100 * results['overall']:.1f}\xa0%" in page
    for label, name in enumerate(("ant", "bee", "cat")):
        assert f"<bdi>{name}</bdi>" in page
        assert f"{100 * results['per_class'][label]:.1f}\xa0%" in page
    assert "Groups of each class" not in page  # a picture, whose alternative text describes it
    assert "Heat map of classes and 4 groups" in page


def test_other_images_are_analysed_again(copied, tmp_path, capsys):
    assert main(["report", str(copied)]) == 0
    other = write_images(tmp_path / "other", [2, 2, 2], seed=9)
    assert main(["report", str(copied), str(other)]) == 0
    err = capsys.readouterr().err
    assert "its analysis is of" in err
    assert "left out: mistakes: The stored predictions are of other images" in err
    assert json.loads((copied / "analysis" / "analysis.json").read_text())["data"]["images"] == 6


def test_images_that_are_gone(copied, tmp_path, capsys):
    settings = json.loads((copied / "settings.json").read_text())
    settings["data"] = str(tmp_path / "gone")
    (copied / "settings.json").write_text(json.dumps(settings))
    assert main(["report", str(copied), "--no-analysis"]) == 0
    assert "left out: mistakes: The images of the run cannot be opened" in capsys.readouterr().err


def test_methods_and_several_runs(copied, data, tmp_path, capsys):
    words = [*BACKBONE, "--batch-size", "16", "--shared.epochs", "1", "--num-workers", "0", "--flip", "0"]
    methods = ("linear_probe", "full", "vpt_shallow", "vpt_deep")
    folders = [tmp_path / method for method in methods]
    for method, folder in zip(methods, folders, strict=True):
        lengths = ["--prompt-length", "2"] if method.startswith("vpt") else []
        assert main(["train", str(data), "--output", str(folder), *words, "--method", method, *lengths]) == 0
    assert main(["report", str(folders[1])]) == 0
    page = (folders[1] / "report.html").read_text("utf-8")
    assert "No prompts" in page
    assert f"--method {methods[1]}" in page
    for folder in folders:
        assert main(["report", str(folder), "--no-analysis"]) == 0
    assert main(["report", str(copied), *map(str, folders), "--no-analysis"]) == 0
    assert f"Written to {copied}/comparison.html" in capsys.readouterr().out
    page = (copied / "comparison.html").read_text("utf-8")
    for method in methods:
        assert f"<bdi>{method}</bdi>" in page
    assert "further runs differ clearly" in page


def test_a_run_of_phase_1_on_validation_images(pair_run, tmp_path, capsys):
    images = write_images(tmp_path / "test", [4, 4], seed=3, names=["été", "日本"])
    run = shutil.copytree(pair_run, tmp_path / "run")
    assert main(["report", str(run), "--no-analysis"]) == 1
    assert "lpt-peft report" in capsys.readouterr().err
    assert main(["report", str(run), str(images)]) == 0
    page = (run / "report.html").read_text("utf-8")
    assert "<bdi>日本</bdi>" in page
    assert "Not trained" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name the output folder"),
        (["missing"], "missing does not exist: give the output folder"),
        (["RUN", "missing"], "missing does not exist: the last argument must be a run or the images"),
        (["missing", "RUN"], "missing does not exist: give the output folder"),
        (["RUN", "RUN", "--no-analysis"], "is given twice"),
        (["RUN", "--no-analysis", "--output", "/proc/none/page.html"], "/proc/none"),
    ],
)
def test_errors_name_the_argument(run, words, message, capsys):
    assert main(["report", *(str(run) if word == "RUN" else word for word in words)]) == 1
    assert message in capsys.readouterr().err


def test_words_of_a_command():
    images = ImageSettings(flip=0.0, exif=False, scale=(0.5, 1.0), background=(0, 0, 0))
    phase = PhaseSettings(epochs=3, head_learning_rate=0.1)
    training = TrainSettings(shared=phase, seed=7, clip_norm=1.5, compile=True)
    run = RunSettings(backbone="b", pretrained=False, images=images, training=training, prompts=PromptSettings(top_k=3))
    words = train_words({"data": "my data", **run.to_dict()}, "out")
    assert words[:7] == ["lpt-peft", "train", "my data", "--backbone", "b", "--output", "out"]
    assert parsed(words) == run


@settings(max_examples=30, deadline=None)
@given(
    st.builds(PromptSettings, prompt_length=st.integers(1, 30), query=st.sampled_from(["final", "block_k"])),
    st.builds(
        TrainSettings,
        seed=st.integers(0, 99),
        eta=st.sampled_from([0.0, 0.25]),
        average=st.none() | st.floats(0.5, 0.99),
        shared=st.builds(PhaseSettings, epochs=st.integers(1, 90), learning_rate=st.floats(1e-6, 10)),
    ),
)
def test_words_of_a_command_give_the_same_settings(prompts, training):
    run = RunSettings(backbone="b", prompts=prompts, training=training)
    assert parsed(train_words({"data": "d", **run.to_dict()}, "out")) == run


def parsed(words):
    """The settings that the flags of a command give, as tyro reads them."""
    assert words[5] == "--output"
    kept = [*words[3:5], *words[7:]]
    found = tyro.cli(Annotated[RunSettings, tyro.conf.arg(name="")], args=kept)
    assert dataclasses.is_dataclass(found)
    return found
