"""lpt-peft train: outputs, settings, resume, processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lpt_peft.cli import main
from lpt_peft.cli.common.run_settings import ImageSettings, RunSettings
from lpt_peft.recipe.training.phase import PhaseRun
from tests.cli.runs import BACKBONE, NAMES, SMALL, same_prompts, write_images
from tests.processes import Child, run_ranks


def test_train_writes_its_documented_files(run):
    assert {path.name for path in run.iterdir()} == {
        "settings.json",
        "checkpoints",
        "predictions.safetensors",
        "prompts",
        "history.json",
        "results.json",
    }
    config = json.loads((run / "prompts" / "config.json").read_text())
    assert config["class_counts"] == [20, 8, 3]
    assert config["head"]["label_names"] == NAMES
    assert config["training"]["recipe"]["shared"]["epochs"] == 2
    history = json.loads((run / "history.json").read_text())
    assert [(record["phase"], record["epoch"]) for record in history] == [
        ("shared", 0),
        ("shared", 1),
        ("group", 0),
        ("group", 1),
    ]
    assert all("validation" in record for record in history)
    results = json.loads((run / "results.json").read_text())
    assert (results["validation"]["num_images"], results["test"]["num_images"]) == (8, 15)
    assert config["training"]["metrics"]["test"]["overall"] == results["test"]["overall"]
    weights = sum(path.stat().st_size for path in run.rglob("*.safetensors"))
    assert weights < 2e6, "the backbone's 22 MB are not saved"


def test_a_settings_file_repeats_its_run(run, data, tmp_path):
    words = ["train", str(data), "--output", str(tmp_path), "--config", str(run / "settings.json")]
    assert main(words) == 0
    assert same_prompts(run, tmp_path)
    changed = json.loads((tmp_path / "settings.json").read_text())
    assert changed == json.loads((run / "settings.json").read_text())


def test_flags_override_the_settings_file(run, data, tmp_path, capsys):
    words = ["train", str(data), "--output", str(tmp_path), "--config", str(run / "settings.json")]
    assert main([*words, "--seed", "4", "--shared.epochs", "1", "--group.epochs", "0", "--json"]) == 0
    settings = json.loads((tmp_path / "settings.json").read_text())["training"]
    assert (settings["seed"], settings["shared"]["epochs"], settings["batch_size"]) == (4, 1, 16)
    assert set(json.loads(capsys.readouterr().out)) == {"validation", "test"}


def test_two_runs_of_one_phase_equal_a_run_of_both(run, data, tmp_path, capsys):
    words = ["train", str(data), *BACKBONE, *SMALL]
    assert main([*words, "--output", str(tmp_path / "first"), "--group.epochs", "0"]) == 0
    first = str(tmp_path / "first" / "prompts")
    second = [*words, "--output", str(tmp_path / "second"), "--shared.epochs", "0"]
    assert main([*second, "--start-from", first]) == 0
    assert same_prompts(run, tmp_path / "second")
    capsys.readouterr()
    assert main(second) == 1
    assert f"start_from is None now and was {first!r}" in capsys.readouterr().err
    others = write_images(tmp_path / "others", [4, 3, 0], seed=5)  # no cats
    words[1] = str(others)
    assert main([*words, "--output", str(tmp_path / "third"), "--start-from", first]) == 0
    assert "keeps the trained rows of 2 classes. In the file, but not used: 'cat'." in capsys.readouterr().err
    assert main([*second[:-2], "--output", str(tmp_path / "no"), "--start-from", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    wrong = ["--prompt-length", "3", "--start-from", first]
    assert main([*words, "--output", str(tmp_path / "no"), *wrong]) == 1
    assert "(12, 2, 192) (blocks, tokens, width), the adapter's (12, 3, 192)" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_starts_by_flags(data, tmp_path, capsys):
    words = ["train", str(data), *BACKBONE, *SMALL, "--init-prompts", "tokens", "--init-groups", "tokens"]
    assert main([*words, "--output", str(tmp_path / "run"), "--init-head", "class_mean"]) == 0
    found = capsys.readouterr().err
    assert (
        "Starts: head class means of the features; shared prompt tokens of training images; keys k-means centers of "
        "the queries; groups tokens of the images nearest to their keys\n" in found
    )
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["training"]
    assert [settings[f"init_{name}"] for name in ("prompts", "head", "groups")] == ["tokens", "class_mean", "tokens"]
    first = ["--start-from", str(tmp_path / "run" / "prompts"), "--output", str(tmp_path / "second")]
    assert main([*words, *first, "--init-head", "class_mean"]) == 1
    assert 'head rows, which --init-head "class_mean" would replace: give --init-head' in capsys.readouterr().err
    assert main([*words, *first, "--shared.epochs", "0"]) == 0
    assert "Starts: head as given; keys k-means centers of the queries; groups tokens" in capsys.readouterr().err


def test_shallow_prompts_by_flag(data, tmp_path, capsys):
    words = ["train", str(data), *BACKBONE, "--method", "vpt_shallow", "--init-prompts", "tokens", "--json"]
    words += ["--batch-size", "16", "--shared.epochs", "2", "--prompt-length", "2", "--output", str(tmp_path)]
    assert main(words) == 0
    results = json.loads(capsys.readouterr().out)
    assert main(words) == 0, "resumed"
    assert json.loads(capsys.readouterr().out) == results
    written = json.loads((tmp_path / "prompts" / "config.json").read_text())
    assert written["prompt"]["placement"] == "shallow"
    assert written["tensors"]["shared.prompts"]["shape"] == [1, 2, 192]
    assert main(["evaluate", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results
    image = next((data / "test").rglob("*.png")) if (data / "test").is_dir() else next(data.rglob("*.png"))
    assert main(["predict", str(tmp_path), str(image)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "prompts")]) == 0
    text = "phase shared: 2 tokens appended before block 1, through all 12 blocks; no groups"
    assert text in capsys.readouterr().out


def test_no_resume_replaces_the_old_run_when_the_new_one_is_complete(data, tmp_path, capsys):
    words = ["train", str(data), "--output", str(tmp_path), *BACKBONE, *SMALL, "--group.epochs", "0"]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path), "--json"]) == 0
    old = json.loads(capsys.readouterr().out)
    other = [*words, "--no-resume", "--crop-pct", "0.5"]
    with Child(main_killed_in, "finalize", ("shared", 2 * 4), other) as child:
        assert child.wait() == -signal.SIGKILL, child.output
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == old, "prompts and settings of the old run"
    assert main(other) == 0
    assert json.loads((tmp_path / "settings.json").read_text())["images"]["crop_pct"] == 0.5
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) != old, "the new run differs"


def test_a_settings_file_without_a_backbone(run, data, tmp_path, capsys):
    values = json.loads((run / "settings.json").read_text())
    for name in ("backbone", "data"):
        del values[name]
    (tmp_path / "settings.json").write_text(json.dumps(values))
    words = ["train", str(data), "--output", str(tmp_path / "run"), "--config", str(tmp_path / "settings.json")]
    with pytest.raises(SystemExit):
        main(words)
    assert "--backbone" in capsys.readouterr().err
    assert main([*words, "--backbone", "vit_tiny_patch16_224"]) == 0
    assert same_prompts(run, tmp_path / "run")


def test_images_of_other_names_are_another_run(run, data, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    others = write_images(tmp_path / "others" / "train", [20, 8, 3])
    before = (tmp_path / "run" / "prompts" / "config.json").read_bytes()
    words = ["--output", str(tmp_path / "run"), *BACKBONE, *SMALL]
    for split in ("val", "test"):
        shutil.copytree(data / split, tmp_path / "others" / split)
    assert main(["train", str(tmp_path / "others"), *words]) == 0, "a copy in another folder is the same data set"
    (others / "ant" / "0.png").rename(others / "ant" / "00.png")
    assert main(["train", str(tmp_path / "others"), *words]) == 1
    assert "image names_crc32 is" in capsys.readouterr().err
    (others / "ant" / "00.png").rename(others / "ant" / "0.png")
    for split in ("train", "val", "test"):
        if (tmp_path / "others" / split / "bee").exists():
            (tmp_path / "others" / split / "bee").rename(tmp_path / "others" / split / "bug")
    assert main(["train", str(tmp_path / "others"), *words]) == 1
    assert "class names_crc32 is" in capsys.readouterr().err
    assert (tmp_path / "run" / "prompts" / "config.json").read_bytes() == before


def test_other_files_in_the_folder_of_checkpoints_stay(data, tmp_path):
    folder = tmp_path / "checkpoints" / "thesis"
    file = tmp_path / "checkpoints" / "thesis.tmp"
    for path in (folder, file):
        path.mkdir(parents=True)
    words = ["train", str(data), "--output", str(tmp_path), *BACKBONE, *SMALL, "--group.epochs", "0"]
    assert main(words) == 0
    assert main([*words, "--no-resume"]) == 0
    assert folder.exists()
    assert file.exists()


def main_killed_in(method, place, words):
    """Run the command; it is killed before a method of the phase, at a step (phase, step)."""
    original = getattr(PhaseRun, method)

    def kill(run, *args):
        if (run.name, run.step) == place:
            os.kill(os.getpid(), signal.SIGKILL)
        original(run, *args)

    setattr(PhaseRun, method, kill)
    main(words)


def test_a_killed_run_resumes(run, data, tmp_path):
    words = ["train", str(data), "--output", str(tmp_path), *BACKBONE, *SMALL]
    with Child(main_killed_in, "training_step", ("group", 5), words) as child:
        assert child.wait() == -signal.SIGKILL, child.output
    assert main(["evaluate", str(tmp_path)]) == 1
    assert main(words) == 0
    assert same_prompts(run, tmp_path)


def test_control_c_saves_and_names_the_way_to_resume(run, data, tmp_path, monkeypatch, capsys):
    original = PhaseRun.training_step

    def interrupt(run, *args):
        if (run.name, run.step) == ("shared", 2):
            os.kill(os.getpid(), signal.SIGINT)
        original(run, *args)

    words = ["train", str(data), "--output", str(tmp_path), *BACKBONE, *SMALL]
    monkeypatch.setattr(PhaseRun, "training_step", interrupt)
    assert main(words) == 130
    err = capsys.readouterr().err
    assert "stopped after step 3 of phase shared" in err
    assert "The same command resumes" in err
    monkeypatch.undo()
    capsys.readouterr()
    before = (tmp_path / "settings.json").read_text()
    assert main([*words, "--flip", "0.5"]) == 1
    assert "images.flip is 0.5 now and was 0.0" in capsys.readouterr().err
    assert (tmp_path / "settings.json").read_text() == before
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "no result yet" in capsys.readouterr().err
    assert main(words) == 0
    assert same_prompts(run, tmp_path)


def main_of_rank(words, folder):
    output = folder / ("run" if os.environ["RANK"] == "0" else "unused")
    return main([*words, "--output", str(output)])


def test_two_processes_train_and_measure_together(data, tmp_path):
    """Only the first process writes, and each image is counted once."""
    words = ["train", str(data), *BACKBONE, *SMALL, "--head-dropout", "0"]
    assert run_ranks(main_of_rank, words, tmp_path, init=False) == [0, 0]
    assert not (tmp_path / "unused").exists()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["validation"]["num_images"], results["test"]["num_images"]) == (8, 15)
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    launched = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", *launched, "-m", "lpt_peft", *words]
    done = subprocess.run([*command, "--output", tmp_path / "launched"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert same_prompts(tmp_path / "run", tmp_path / "launched")
    assert done.stdout.count("many: n > 100") == 1, "only the main process prints"


def test_trackers(data, tmp_path, capsys):
    words = ["train", str(data), *BACKBONE, *SMALL, "--shared.epochs", "1", "--group.epochs", "0"]
    if _installed("tensorboard"):
        assert main([*words, "--output", str(tmp_path / "board"), "--log-with", "tensorboard"]) == 0
        assert list((tmp_path / "board").rglob("events.out.tfevents*"))
    if not _installed("trackio"):
        assert main([*words, "--output", str(tmp_path / "none"), "--log-with", "trackio"]) == 1
        assert "pip install trackio" in capsys.readouterr().err


def _installed(name):
    try:
        __import__(name)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("place", ["file", "file/below", "locked/below"])
def test_output_that_cannot_be_written(data, tmp_path, capsys, place):
    (tmp_path / "file").write_text("text")
    (tmp_path / "locked").mkdir(mode=0o500)
    if place == "locked/below" and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    assert main(["train", str(data), "--output", str(tmp_path / place), *BACKBONE, *SMALL]) == 1
    message = capsys.readouterr().err
    assert f"{tmp_path / place} must be a folder" in message or "settings.json cannot be written" in message
    assert "Errno" not in message
    assert (tmp_path / "file").read_text() == "text"


def test_presets(data, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("lpt_peft.cli.train.run_training", lambda data, output, run, **options: seen.append(run))
    words = ["train", str(data), "--output", str(tmp_path), *BACKBONE]
    assert main([*words, "--preset", "inat2018", "--shared.epochs", "3"]) == 0
    [run] = seen
    assert (run.training.shared.epochs, run.training.group.epochs) == (3, 80)
    assert (run.training.init_groups, run.training.phases, run.prompts.query) == ("random", "decoupled", "final")
    assert (run.shot_rule, run.images.crop_pct) == ("lpt", 224 / 256)
    assert main([*words, "--preset=places"]) == 1
    assert "the presets are paper, inat2018" in capsys.readouterr().err
    assert main([*words, "--preset", "paper", "--config", "x.json"]) == 1
    assert "give one of them" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", str(data), "--output", str(tmp_path)])
    assert "--backbone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not strict JSON"),
        ("[]", "must hold a JSON object"),
        ('{"backbone": "a", "shot_rule": []}', "shot_rule=[] must be one of lift, oltr, lpt"),
        ('{"backbone": "a", "colour": 1}', "RunSettings has no colour"),
        ('{"backbone": "a", "images": {"colour": 1}}', "ImageSettings has no colour"),
        ('{"backbone": "a", "images": {"scale": 1}}', "scale=1 must be 2 numbers"),
        ('{"backbone": "a", "images": {"flip": "x"}}', "flip='x' must be float"),
        ('{"backbone": "a", "pretrained": 1}', "pretrained=1 must be bool"),
        ('{"backbone": "a", "prompts": 3}', "PromptSettings needs a mapping of names to values"),
        ('{"backbone": "a", "training": {"lr": 1}}', "TrainSettings has no lr"),
    ],
)
def test_invalid_settings_files(data, tmp_path, capsys, content, words):
    file = tmp_path / "settings.json"
    file.write_text(content)
    assert main(["train", str(data), "--output", str(tmp_path / "out"), "--config", str(file)]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_run_settings_as_json_and_back():
    run = RunSettings(backbone="a", backbone_weights=Path("w"), images=ImageSettings(root=Path("r"), scale=(0.5, 1.0)))
    assert RunSettings.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_without_the_extra_the_other_commands_work(tmp_path, run, data):
    image = data / "test" / "ant" / "0.png"
    commands = [["train", "x", "--output", "y", *BACKBONE], ["evaluate", "x"]]
    program = (  # in a new process, because imported modules would stay
        "import sys\n"
        "sys.modules['accelerate'] = None\n"
        "from lpt_peft.cli import main\n"
        f"for words in {commands}: assert main(words) == 1\n"
        f"assert main(['inspect', {str(run / 'prompts')!r}]) == 0\n"
        f"assert main(['predict', {str(run)!r}, {str(image)!r}]) == 0\n"
        f"assert main(['check', {str(data / 'test')!r}]) == 0\n"
        "main(['train', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[: len(commands)] == [
        f'lpt-peft: lpt-peft {words[0]} needs accelerate: pip install "lpt_peft[train]".' for words in commands
    ]
    assert "All checks passed" in done.stdout
    assert str(image) in done.stdout
    assert "15 images of 3 classes" in done.stdout
    assert "usage: lpt-peft train" in done.stdout
    assert list(tmp_path.iterdir()) == []
