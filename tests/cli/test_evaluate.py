"""lpt-peft evaluate."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState

from lpt_peft.cli import main
from lpt_peft.cli.common.load_run import load_run
from tests.cli.runs import BACKBONE, SMALL, load_adapter


def test_evaluate_gives_the_results_of_the_run(run, data, capsys):
    expected = json.loads((run / "results.json").read_text())
    for words in (["evaluate", str(run), "--json"], ["evaluate", str(run), str(data), "--json"]):
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out) == expected
    assert main(["evaluate", str(run), str(data / "test"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"test": expected["test"]}
    assert main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"{100 * expected['test']['overall']:.2f}" in out
    assert "many: n > 100, medium: 20 < n <= 100, few: n <= 20" in out
    rows = expected["test"]["classes"]
    worst = min(rows, key=lambda row: (row["accuracy"], -row["train_images"]))
    assert f"worst: {worst['name']} {100 * worst['accuracy']:.0f} % ({worst['train_images']})" in out
    best = max(rows, key=lambda row: (row["accuracy"], row["train_images"]))
    present = [sum(row["images"] > 0 for row in expected[split]["classes"]) for split in ("validation", "test")]
    listed = [line.count(" % (") for line in out.splitlines() if line.startswith("  ")]
    assert listed == [size for count in present for size in ((count + 1) // 2, count // 2)], "no class in both lists"
    assert f"best: {best['name']} {100 * best['accuracy']:.0f} % ({best['train_images']})\n" in out
    never = sum(row["accuracy"] == 0 for row in rows)
    assert f"test: {never} of 3 classes never right" in out
    assert expected["test"]["never_right"] == never


def test_evaluate_uses_the_precision_of_the_run(data, tmp_path, capsys):
    options = ["--backbone-dtype", "bfloat16", "--mixed-precision", "bf16", "--num-workers", "None"]
    AcceleratorState._reset_state()
    try:
        assert main(["train", str(data), "--output", str(tmp_path), *BACKBONE, *SMALL, *options]) == 0
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path), "--json"]) == 0
    finally:
        AcceleratorState._reset_state()
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "results.json").read_text())
    recipe = json.loads((tmp_path / "prompts" / "config.json").read_text())["training"]["recipe"]
    assert (recipe["backbone_dtype"], recipe["mixed_precision"], recipe["num_workers"]) == ("bfloat16", "bf16", None)
    adapter = load_run(tmp_path).model
    assert {parameter.dtype for parameter in adapter.vit.parameters()} == {torch.bfloat16}
    assert adapter.head.weight.dtype == torch.float32


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")
def test_a_run_in_fp16_is_measured_in_float32_without_a_gpu(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "settings.json").read_text())
    settings["training"]["mixed_precision"] = "fp16"
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="measured in fp16, which needs a GPU"):
        assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run / "results.json").read_text())


def test_evaluate_prefers_the_given_data_to_that_of_the_run(data, tmp_path, capsys):
    words = ["train", str(data), *BACKBONE, *SMALL, "--group.epochs", "0", "--test", str(data / "test")]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    shutil.copytree(data, tmp_path / "other")
    for image in sorted((tmp_path / "other" / "test").rglob("*.png"))[:12]:
        image.unlink()
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), str(tmp_path / "other"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["num_images"] == 3


def test_a_prompt_file_does_not_name_its_data(run, capsys, monkeypatch):
    monkeypatch.setattr(  # timm has no weights for this backbone
        "lpt_peft.adapter.LongTailPromptAdapter.from_pretrained", load_adapter
    )
    assert main(["evaluate", str(run / "prompts")]) == 1
    assert "does not name its training data" in capsys.readouterr().err


def test_nothing_to_evaluate(run, data, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "settings.json").read_text()) | {"data": str(data / "train")}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "neither a validation nor a test split" in streams.err
    assert "lpt-peft evaluate DIR DATA" in streams.err


def test_unreadable_images_are_left_out_and_change_the_exit_status(run, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    for number in range(2):
        (tmp_path / "data" / "train" / "ant" / f"{number}.png").write_bytes(b"")
        (tmp_path / "data" / "test" / "bee" / f"{number}.png").write_bytes(b"")
    words = [str(tmp_path / "data"), "--output", str(tmp_path / "run"), *BACKBONE, *SMALL, "--group.epochs", "0"]
    assert main(["train", *words, "--unreadable", "skip"]) == 3
    streams = capsys.readouterr()
    assert streams.err.count("warning: train: 2 of 31 images cannot be read; other images of their classes") == 1
    assert streams.err.count("warning: test: 2 of 15 images cannot be read; they are left out of the counts") == 1
    assert streams.err.count("Test: 15 images of 3 classes") == streams.err.count("31 images of 3 classes") == 1
    assert streams.err.count("Validation: 8 images of 3 classes") == streams.err.count("8 images of") == 1
    assert "settings.json, left_out.json, checkpoints/" in streams.out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["num_images"] == 13
    listed = json.loads((tmp_path / "run" / "left_out.json").read_text())
    assert {name: entry["unreadable"]["count"] for name, entry in listed.items()} == {"train": 2, "test": 2}
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 3
    streams = capsys.readouterr()
    assert json.loads(streams.out) == results
    assert streams.err.count("warning: test: 2 of 15 images cannot be read; they are left out of the counts") == 1
    assert main(["train", *words]) == 1, "the default stops at an unreadable image"
    assert "cannot be read" in capsys.readouterr().err


def test_a_validation_split_of_training_images_is_noted(data, tmp_path, capsys):
    words = ["train", str(data / "train"), "--output", str(tmp_path / "run"), *BACKBONE, *SMALL]
    words += ["--group.epochs", "0", "--shared.epochs", "1"]
    (tmp_path / "link").symlink_to(data / "train")
    assert main([*words, "--val", str(tmp_path / "link"), "--test", str(data / "test")]) == 0
    err = capsys.readouterr().err
    assert err.count("note: all 31 images are also training images, such as ") == err.count("also training images") == 1


def test_crops_and_post_hoc_adjustment(run, data, capsys):
    capsys.readouterr()
    rules = {}
    for words in ([], ["--crops", "5"], ["--crops", "5", "--post-hoc-tau", "1"]):
        assert main(["evaluate", str(run), *words, "--json"]) == 0
        rules[len(words)] = json.loads(capsys.readouterr().out)["test"]["rule"]
    assert rules[2] == f"{rules[0]}; mean of log p over 5 crops"
    assert rules[4] == f"{rules[2]}; post-hoc logit adjustment, tau 1"
    assert main(["evaluate", str(run), "--post-hoc-tau", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert "post-hoc logit adjustment, tau 0.5" in out
    assert "trained with loss lpt and sampling dual, which account for class frequencies already" in err
    for value in ("-1", "nan"):
        assert main(["evaluate", str(run), "--post-hoc-tau", value]) == 1
        assert f"--post-hoc-tau {float(value)} must be at least 0 and finite" in capsys.readouterr().err
