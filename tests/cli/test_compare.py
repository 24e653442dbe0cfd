"""`lpt-peft compare` as a command: finished, killed and resumed, side by side; and what it refuses before it trains."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from lpt_peft.cli import main
from lpt_peft.recipe.compare import schedule
from lpt_peft.recipe.predictions import read_predictions
from tests.cli.runs import write_images
from tests.processes import Child, wait_until

ROWS = """
baseline = "probe"
[defaults]
backbone = "glyph_vit"
batch_size = 16
shared = { epochs = 2, learning_rate = 2.0 }
group = { epochs = 1 }
prompt_length = 2
pool_size = 4
flip = 0
scale = [0.9, 1]

[rows.probe]
method = "linear_probe"
sampling = "instance"
loss = "cross_entropy"

[rows.lpt]
"""
MEASURED = {"seconds", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.toml"
    path.write_text(ROWS)
    return path


def words_of(data, rows, output, *more):
    return ["compare", str(data), "--rows", str(rows), "--seeds", "2", "--output", str(output), *more]


@pytest.fixture(scope="module")
def finished(data, rows, tmp_path_factory):
    """The output of two rows with two seeds; not to be changed."""
    output = tmp_path_factory.mktemp("compared") / "out"
    assert main(words_of(data, rows, output)) == 0
    return output


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(schedule, "_start", lambda *args: pytest.fail("a cell was started"))


def results(output):
    """results.json without times and memory, which no run repeats."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key not in MEASURED}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return plain(json.loads((output / "results.json").read_text()))


def test_writes_runs_table_and_figure(finished, data, rows, capsys, no_training):
    assert {path.name for path in finished.iterdir()} >= {"results.json", "table.md", "compare.png", "probe", "lpt"}
    cells = [finished / row / f"seed{seed}" for row in ("probe", "lpt") for seed in (0, 1)]
    assert all((cell / "predictions.safetensors").exists() and (cell / "log.txt").exists() for cell in cells)
    content = results(finished)
    assert [row["name"] for row in content["rows"]] == ["probe", "lpt"]
    assert (content["split"], content["seeds"], content["baseline"], content["images"]) == ("test", [0, 1], "probe", 15)
    lpt = content["rows"][1]
    for run in lpt["runs"]:
        own = json.loads((finished / run["folder"] / "results.json").read_text())["test"]
        assert run["overall"] == own["overall"]
    assert lpt["figures"]["overall"]["mean"] == pytest.approx(sum(run["overall"] for run in lpt["runs"]) / 2)
    assert lpt["figures"]["overall"]["difference"] is not None
    assert content["rows"][0]["figures"]["overall"]["difference"] is None
    assert content["rows"][0]["trained_parameters"] == 3 * 128 < lpt["trained_parameters"]
    before = (finished / "results.json").read_bytes()
    assert main(words_of(data, rows, finished)) == 0
    captured = capsys.readouterr()
    assert "4 of 4 runs are finished" in captured.err
    assert (finished / "results.json").read_bytes() == before, "only the table is computed again"
    lines = captured.out.splitlines()
    assert lines[0].split()[:2] == ["overall", "95"]
    assert [line.split()[0] for line in lines[1:3]] == ["probe", "lpt"]
    assert main(words_of(data, rows, finished, "--json")) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(before)


def test_a_cell_is_an_ordinary_run(finished, data, capsys):
    assert main(["evaluate", str(finished / "lpt" / "seed1"), "--json"]) == 0
    expected = json.loads((finished / "lpt" / "seed1" / "results.json").read_text())
    assert json.loads(capsys.readouterr().out) == expected


def run_command(words):
    return main(words)


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed_side_by_side_gives_the_same(finished, data, rows, tmp_path):
    """SIGKILL of the command after the first checkpoint of the last row, then twice as many processes."""
    output = tmp_path / "out"
    with Child(run_command, words_of(data, rows, output)) as child:
        wait_until(lambda: list(output.glob("lpt/seed0/checkpoints/1-joint-*")) or child.exit_code is not None)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not (output / "results.json").exists()
    assert not (output / "lpt" / "seed1").exists()
    with Child(run_command, words_of(data, rows, output, "--jobs", "2")) as child:
        assert child.result() == 0
    assert results(output) == results(finished)
    for row in ("probe", "lpt"):
        for seed in (0, 1):
            files = [folder / row / f"seed{seed}" / "predictions.safetensors" for folder in (output, finished)]
            assert files[0].read_bytes() == files[1].read_bytes()
    log = (output / "lpt" / "seed0" / "log.txt").read_text()
    assert "Resuming phase" in log


def test_settings_are_chosen_without_the_test_split(data, rows, tmp_path, capsys):
    """Validation images are held out by the seed, so they differ between seeds; then the test split is measured."""
    text = rows.read_text().replace("[rows.probe]", "validation_share = 0.2\n[rows.probe]").split("[rows.lpt]")[0]
    (tmp_path / "rows.toml").write_text(text)
    train = shutil.copytree(data / "train", tmp_path / "data" / "train")
    words = words_of(tmp_path / "data", tmp_path / "rows.toml", tmp_path / "out", "--jobs", "2")
    shutil.copytree(data / "test", train.parent / "test")
    assert main([*words, "--split", "validation"]) == 0
    content = results(tmp_path / "out")
    assert (content["split"], content["images"]) == ("validation", 5)
    cells = [tmp_path / "out" / "probe" / f"seed{seed}" for seed in (0, 1)]
    found = [read_predictions(cell / "predictions.safetensors") for cell in cells]
    assert [list(splits) for splits in found] == [["validation"]] * 2
    assert found[0]["validation"].images != found[1]["validation"].images
    assert main(words) == 0
    content = results(tmp_path / "out")
    assert (content["split"], content["images"]) == ("test", 15)
    assert "Resuming" in (cells[0] / "log.txt").read_text()


def test_failed_rows_are_named_and_the_others_compared(data, rows, tmp_path, capsys):
    text = rows.read_text().replace("baseline", "#") + "shared = { epochs = 1, learning_rate = 1e30 }\n"
    (tmp_path / "rows.toml").write_text(text)
    words = words_of(data, tmp_path / "rows.toml", tmp_path / "out", "--jobs", "2")
    assert main([*words, "--seeds", "1"]) == 1
    captured = capsys.readouterr()
    content = results(tmp_path / "out")
    assert [row["name"] for row in content["rows"]] == ["probe"]
    assert [(cell["row"], cell["seed"]) for cell in content["failed"]] == [("lpt", 0)]
    assert "lpt-peft: lpt, seed 0 failed: " in captured.err
    assert "The loss became nan in step" in content["failed"][0]["error"]


# Refused before anything is trained


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--baseline", "none"], "--baseline none must be a row: probe, lpt"),
        (["--batch-size", "3"], "--batch-size 3 must be even"),
        (["--shared.momentum", "2"], "--shared.momentum 2 must be at least 0 and below 1"),
        (["--shared-layers", "99"], "row lpt: "),
        (["--backbone", "no_such_vit"], "row probe: "),
    ],
)
def test_wrong_arguments(no_training, data, rows, tmp_path, capsys, more, message):
    text = rows.read_text().replace('backbone = "glyph_vit"\n', "") if more[0] == "--backbone" else rows.read_text()
    (tmp_path / "rows.toml").write_text(text)
    assert main(words_of(data, tmp_path / "rows.toml", tmp_path / "out", *more)) == 1
    assert message in capsys.readouterr().err


def test_flags_that_rows_override_are_reported(no_training, data, rows, tmp_path, capsys):
    assert main(words_of(data, rows, tmp_path / "out", "--method", "full", "--jobs", "0")) == 1
    assert "row probe sets --method itself, so the flag does not change it" in capsys.readouterr().err


def test_sizes_without_effect_are_named_once_for_each_row(no_training, data, rows, tmp_path, capsys):
    """Sizes of [defaults] that another row uses are not named; those of no row are."""
    own = tmp_path / "rows.toml"
    own.write_text(rows.read_text().replace("[rows.lpt]", "top-k = 1\n[rows.lpt]"))
    assert main(words_of(data, own, tmp_path / "out", "--jobs", "0")) == 1
    found = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert found == ["lpt-peft: row probe: top_k: no effect with method linear_probe"]
    words = words_of(data, "linear_probe,vpt_deep", tmp_path / "out", "--jobs", "0", "--prompt-length", "3")
    assert main([*words, "--pool-size", "3", "--backbone", "glyph_vit"]) == 1
    found = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert found == [
        "lpt-peft: row linear_probe: pool_size: no effect with method linear_probe",
        "lpt-peft: row vpt_deep: pool_size: no effect with method vpt_deep",
    ]


def test_the_file_of_another_method_is_not_counted(no_training, copied, data, rows, capsys):
    """A folder that was used for two methods holds prompts/ and model/."""
    expected = {row["name"]: row["file_bytes"] for row in results(copied)["rows"]}
    for cell in copied.glob("*/seed*"):
        other = cell / ("prompts" if (cell / "model").exists() else "model")
        other.mkdir()
        (other / "large.bin").write_bytes(bytes(10**6))
    assert main(words_of(data, rows, copied)) == 0
    assert {row["name"]: row["file_bytes"] for row in results(copied)["rows"]} == expected
    for name, size in expected.items():
        folder = "model" if name == "probe" else "prompts"
        cells = [cell / folder for cell in (copied / name).glob("seed*")]
        assert size == max(sum(file.stat().st_size for file in cell.iterdir()) for cell in cells)


def test_data_without_the_split(no_training, data, rows, tmp_path, capsys):
    words = words_of(data / "train", rows, tmp_path / "out")
    assert main(words) == 1
    assert "no test split to compare rows on: give --test, or --split validation" in capsys.readouterr().err
    assert main([*words, "--split", "validation"]) == 1
    assert "no validation split to compare rows on: give --validation-share" in capsys.readouterr().err


def test_an_output_folder_among_the_images(no_training, data, rows, capsys):
    assert main(words_of(data / "train", rows, data / "train" / "out")) == 1
    assert "which is read for images" in capsys.readouterr().err


def test_a_launcher_of_several_processes(no_training, data, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words_of(data, rows, tmp_path / "out")) == 1
    assert "starts its own processes" in capsys.readouterr().err


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_changed_settings_are_named(no_training, copied, data, rows, tmp_path, capsys):
    (tmp_path / "rows.toml").write_text(rows.read_text() + "prompt_length = 3\nnum_workers = 0\n")
    assert main(words_of(data, tmp_path / "rows.toml", copied)) == 1
    err = capsys.readouterr().err
    assert "lpt, seed 0: " in err
    assert "other settings: prompts.prompt_length is 3 now and was 2. Use those settings, rename the row" in err


def test_other_images_are_refused(no_training, copied, data, rows, tmp_path, capsys):
    other = Path(shutil.copytree(data, tmp_path / "data"))
    write_images(other / "test", [6, 5, 5], seed=2)
    assert main(words_of(other, rows, copied)) == 1
    assert "probe, seed 0: the predictions in " in capsys.readouterr().err


def test_left_out_images_set_the_exit_status(no_training, copied, data, rows, capsys):
    record = json.loads((copied / "probe" / "seed1" / "cell.json").read_text())
    (copied / "probe" / "seed1" / "cell.json").write_text(json.dumps({**record, "incomplete": True}))
    assert main(words_of(data, rows, copied)) == 3


def test_another_baseline(no_training, copied, data, rows, capsys):
    assert main(words_of(data, rows, copied, "--baseline", "lpt")) == 0
    content = results(copied)
    assert content["baseline"] == "lpt"
    assert content["rows"][0]["figures"]["overall"]["difference"] is not None


def test_a_damaged_cell_is_named(no_training, copied, data, rows, capsys):
    (copied / "lpt" / "seed0" / "predictions.safetensors").write_bytes(b"x")
    assert main(words_of(data, rows, copied)) == 1
    assert "seed0/predictions.safetensors cannot be read" in capsys.readouterr().err
    (copied / "lpt" / "seed0" / "cell.json").write_text("{}")
    assert main(words_of(data, rows, copied)) == 1
    assert "seed0/cell.json is damaged" in capsys.readouterr().err


def test_lost_predictions_are_computed_again(copied, data, rows, capsys):
    before = results(copied)
    (copied / "lpt" / "seed0" / "predictions.safetensors").unlink()
    assert main(words_of(data, rows, copied)) == 0
    assert "3 of 4 runs are finished" in capsys.readouterr().err
    assert results(copied) == before
