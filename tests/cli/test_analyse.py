"""lpt-peft analyse."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from lpt_peft.cli import main
from tests.cli.runs import BACKBONE, NAMES, write_images

PICTURES = {"classes", "features", "projection", "matching", "pool", "calibration", "shift"}


def read(folder):
    return json.loads((folder / "analysis.json").read_text())


def test_analyse_writes_json_and_pictures(run, data, tmp_path, capsys):
    shifted = write_images(tmp_path / "shifted", [3, 3], seed=5, names=["BEE", "zebra"])
    output = tmp_path / "out"
    words = ["analyse", str(run), "--output", str(output), "--shift", f"other={shifted}", "--json"]
    assert main([*words, "--pretraining", str(data / "val")]) == 0
    analysis = json.loads(capsys.readouterr().out)
    assert analysis == read(output)
    results = json.loads((run / "results.json").read_text())["test"]
    assert analysis["accuracy"]["overall"]["estimate"] == pytest.approx(results["overall"], abs=1e-6)
    assert analysis["classes"]["accuracy"] == pytest.approx(results["per_class"], abs=1e-6)
    error = analysis["calibration"]["before"]["overall"]["error"]
    assert error == pytest.approx(results["expected_calibration_error"], abs=1e-6)
    assert set(analysis["features"]) == {"plain", "shared", "group"}
    assert sum(analysis["matching"]["usage"]) == 2 * results["num_images"]
    assert analysis["pool"]["rows"]["chosen"]["balanced_accuracy"] == pytest.approx(results["overall"], abs=1e-6)
    noise, blur, other = analysis["shift"]
    assert (noise["kind"], blur["kind"], other["kind"]) == ("noise", "blur", "folder")
    assert (other["classes"], other["images"], other["unmatched"], other["missing"]) == (
        1,
        3,
        ["zebra"],
        ["ant", "cat"],
    )
    assert other["original"] == pytest.approx(results["per_class"][1], abs=1e-6)
    assert analysis["pretraining"]["images"] == 8
    found = {path.stem for path in output.glob("*.png")}
    assert found >= PICTURES | {"pretraining"}
    for path in output.glob("*.png"):
        Image.open(path).verify()


def test_analyse_prints_tables_and_writes_into_the_run(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    assert main(["analyse", str(copy), "--max-images", "9", "--max-variant-images", "6"]) == 0
    out = capsys.readouterr().out
    for word in ("plain ViT", "with groups", "gamma", "oracle", "noise", "analysis.json"):
        assert word in out
    sizes = read(copy / "analysis")["data"]
    assert (sizes["images"], sizes["feature_images"], sizes["train_images"], sizes["variant_images"]) == (15, 9, 9, 6)


def test_run_of_phase_1_without_test_images(pair_run, tmp_path, capsys):
    images = write_images(tmp_path / "test", [4, 4], seed=3, names=["été", "日本"])
    assert main(["analyse", str(pair_run), str(images), "--output", str(tmp_path / "out")]) == 0
    analysis = read(tmp_path / "out")
    assert set(analysis["features"]) == {"plain", "shared"}
    assert "matching" not in analysis
    assert "pool" not in analysis
    assert set(analysis["left_out"]) == {"matching", "pool", "projection", "temperature"}
    assert "left out: pool: the model selects no groups" in capsys.readouterr().out
    assert main(["analyse", str(pair_run)]) == 1
    assert "neither a test nor a validation split" in capsys.readouterr().err


def test_training_images_that_are_gone_are_left_out(run, data, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    settings = json.loads((copy / "settings.json").read_text())
    settings["data"] = str(tmp_path / "gone")
    (copy / "settings.json").write_text(json.dumps(settings))
    assert main(["analyse", str(copy), str(data / "test")]) == 0
    assert "training images of the run are left out" in capsys.readouterr().err
    analysis = read(copy / "analysis")
    assert "knn_1" not in analysis["features"]["plain"]
    assert analysis["features"]["plain"]["gamma"] is not None
    assert "no training images" in analysis["left_out"]["knn"]


def test_linear_probe(data, tmp_path, capsys):
    words = [*BACKBONE, "--batch-size", "16", "--method", "linear_probe", "--shared.epochs", "1", "--num-workers", "0"]
    assert main(["train", str(data), "--output", str(tmp_path / "run"), *words]) == 0
    assert main(["analyse", str(tmp_path / "run")]) == 0
    analysis = read(tmp_path / "run" / "analysis")
    assert analysis["model"]["method"] == "linear_probe"
    assert list(analysis["features"]) == ["plain"]
    assert "left out: pool" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shift", "sketch"], "must be NAME=PATH"),
        (["--shift", "noise=x"], "always measured"),
        (["--shift", "a=x", "a=y"], "given twice"),
        (["--shift", "a=missing-folder"], "missing-folder"),
        (["--max-images", "0"], "--max-images 0 must be an integer of at least 1"),
    ],
)
def test_errors_name_the_option(run, words, message, capsys):
    assert main(["analyse", str(run), *words]) == 1
    assert message in capsys.readouterr().err


def test_shifted_images_of_other_classes_are_refused(run, tmp_path, capsys):
    images = write_images(tmp_path, [2, 2, 2], names=[f"not {name}" for name in NAMES])
    assert main(["analyse", str(run), "--shift", f"a={images}"]) == 1
    err = capsys.readouterr().err
    assert "None of the classes" in err
    assert "evaluated images:" not in err, "refused before the passes over the images"
