"""lpt-peft train --find-lr."""

from __future__ import annotations

import json
import sys

import pytest

from lpt_peft.cli import main
from tests.cli.runs import SMALL, write_images

GLYPH = ["--backbone", "glyph_vit", *SMALL]


def test_find_lr_writes_its_files_and_trains_nothing(tmp_path, capsys):
    data = write_images(tmp_path / "data", [20, 8, 3])
    words = ["train", str(data), "--output", str(tmp_path / "run"), *GLYPH, "--find-lr"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"find_lr.json", "find_lr.png"}
    content = json.loads((tmp_path / "run" / "find_lr.json").read_text())
    assert (content["phase"], content["batch_size"], content["optimizer"]) == ("shared", 16, "sgd")
    assert f"Suggestion: --shared.learning-rate {content['suggestion']:g}" in out
    assert f"Written to {tmp_path / 'run'}/: find_lr.json, find_lr.png" in out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == content, "the same result again"


def test_the_group_phase_is_tested_from_trained_prompts(tmp_path, capsys, monkeypatch):
    data = write_images(tmp_path / "data", [20, 8, 3])
    words = ["train", str(data), *GLYPH]
    assert main([*words, "--output", str(tmp_path / "first"), "--group.epochs", "0"]) == 0
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words += ["--shared.epochs", "0", "--start-from", str(tmp_path / "first" / "prompts"), "--find-lr"]
    assert main([*words, "--output", str(tmp_path / "second")]) == 0
    captured = capsys.readouterr()
    assert "Suggestion: --group.learning-rate" in captured.out or "no suggestion" in captured.out
    assert "find_lr.png needs matplotlib: pip install matplotlib" in captured.err
    assert {path.name for path in (tmp_path / "second").iterdir()} == {"find_lr.json"}
    assert json.loads((tmp_path / "second" / "find_lr.json").read_text())["phase"] == "group"


@pytest.mark.parametrize(("flags", "name"), [(["--no-resume"], "--no-resume"), (["--log-with", "wandb"], "--log-with")])
def test_flags_without_effect_are_refused(tmp_path, capsys, flags, name):
    write_images(tmp_path / "data", [4, 3, 2])
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "data"), *GLYPH, "--output", str(run), "--find-lr", *flags]) == 1
    assert f"{name} has no effect with --find-lr, which trains nothing: leave it out." in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize(("flags", "name"), [([], ""), (["--shared.head-learning-rate", "0.5"], "head-")])
def test_the_suggestion_for_a_linear_probe_is_for_the_rate_that_is_used(tmp_path, capsys, flags, name):
    data = write_images(tmp_path / "data", [20, 8, 3])
    words = ["train", str(data), "--backbone", "glyph_vit", "--output", str(tmp_path / "run"), "--find-lr", *flags]
    words += ["--method", "linear_probe", "--loss", "cross_entropy", "--sampling", "instance", "--batch-size", "16"]
    assert main(words) == 0
    content = json.loads((tmp_path / "run" / "find_lr.json").read_text())
    assert f"Suggestion: --shared.{name}learning-rate {content['suggestion']:g}" in capsys.readouterr().out
    assert content["learning_rate"][0] == pytest.approx(1e-4)
