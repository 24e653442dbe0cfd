"""lpt-peft train, evaluate and predict, called as a user calls them, on pictures of stripes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

from lpt_peft.checkpoint import load_prompts
from lpt_peft.cli import main
from lpt_peft.cli.common.build_run import build_backbone
from lpt_peft.cli.common.load_run import open_trained
from lpt_peft.cli.common.open_data import open_parts, open_test_parts
from lpt_peft.cli.common.run_settings import ImageSettings, RunSettings
from lpt_peft.errors import BackboneError, ConfigError, InputError
from lpt_peft.recipe.loading.split import split_validation
from lpt_peft.recipe.training.phase import PhaseRun
from tests.processes import Child, run_ranks

BACKBONE = ["--backbone", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32"]
SMALL = [
    "--batch-size",
    "16",
    "--shared.epochs",
    "2",
    "--group.epochs",
    "2",
    "--prompt-length",
    "2",
    "--pool-size",
    "4",
]
SMALL += ["--shared.learning-rate", "2", "--flip", "0", "--scale", "0.9", "1", "--crop-pct", "1"]
NAMES = ["ant", "bee", "cat"]


def main_killed_in(method, where, words):
    """The command, killed before a method of the phase, in this phase after so many steps."""
    original = getattr(PhaseRun, method)

    def killing(run, *args):
        if (run.name, run.step) == where:
            os.kill(os.getpid(), signal.SIGKILL)
        original(run, *args)

    setattr(PhaseRun, method, killing)
    main(words)


def main_of_rank(words, folder):
    output = folder / ("run" if os.environ["RANK"] == "0" else "nobody")
    return main([*words, "--output", str(output)])


def write_images(folder, counts, seed=0):
    """Class folders of pictures whose stripe lies where the class says."""
    generator = np.random.default_rng(seed)
    for label, (name, count) in enumerate(zip(NAMES, counts, strict=True)):
        for number in range(count):
            pixels = generator.integers(0, 80, (32, 32, 3), dtype=np.uint8)
            pixels[:, 10 * label : 10 * label + 10] += 150
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "train", [20, 8, 3])
    write_images(folder / "val", [4, 4, 0], seed=1)
    write_images(folder / "test", [5, 5, 5], seed=2)
    return folder


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A finished run."""
    output = tmp_path_factory.mktemp("run")
    assert main(["train", str(data), "--output", str(output), *BACKBONE, *SMALL]) == 0
    return output


def prompts(output):
    return load_file(output / "prompts" / "prompts.safetensors")


def same_prompts(one, other):
    one, other = prompts(one), prompts(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_train_writes_all_that_is_promised(done):
    assert {path.name for path in done.iterdir()} == {
        "settings.json",
        "checkpoints",
        "prompts",
        "history.json",
        "results.json",
    }
    config = json.loads((done / "prompts" / "config.json").read_text())
    assert config["class_counts"] == [20, 8, 3]
    assert config["head"]["label_names"] == NAMES
    assert config["training"]["recipe"]["shared"]["epochs"] == 2
    history = json.loads((done / "history.json").read_text())
    assert [(record["phase"], record["epoch"]) for record in history] == [
        ("shared", 0),
        ("shared", 1),
        ("group", 0),
        ("group", 1),
    ]
    assert all("validation" in record for record in history)
    results = json.loads((done / "results.json").read_text())
    assert (results["validation"]["num_images"], results["test"]["num_images"]) == (8, 15)
    assert config["training"]["metrics"]["test"]["overall"] == results["test"]["overall"]
    weights = sum(path.stat().st_size for path in done.rglob("*.safetensors"))
    assert weights < 2e6, "nothing of the backbone's 22 MB"


def test_evaluate_reprints_the_numbers(done, data, capsys):
    wanted = json.loads((done / "results.json").read_text())
    for words in (["evaluate", str(done), "--json"], ["evaluate", str(done), str(data), "--json"]):
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out) == wanted
    assert main(["evaluate", str(done), str(data / "test"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"test": wanted["test"]}
    assert main(["evaluate", str(done)]) == 0
    out = capsys.readouterr().out
    assert f"{100 * wanted['test']['overall']:.2f}" in out
    assert "many: n > 100" in out


def test_evaluate_repeats_the_precision_of_the_run(data, tmp_path, capsys):
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
    adapter = open_trained(tmp_path).adapter
    assert {parameter.dtype for parameter in adapter.vit.parameters()} == {torch.bfloat16}
    assert adapter.head.weight.dtype == torch.float32


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")
def test_a_run_in_fp16_is_measured_in_float32_without_a_gpu(done, tmp_path, capsys):
    shutil.copytree(done, tmp_path / "run")
    settings = json.loads((done / "settings.json").read_text())
    settings["training"]["mixed_precision"] = "fp16"
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="measured in fp16, which needs a GPU"):
        assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((done / "results.json").read_text())


def test_predict_names_classes(done, data, capsys):
    images = [str(data / "test" / name / "0.png") for name in NAMES]
    assert main(["predict", str(done), *images, "--json", "--top-k", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["image"] for one in told] == images
    assert all(len(one["classes"]) == 2 for one in told)
    assert all(one["classes"][0]["probability"] >= one["classes"][1]["probability"] for one in told)
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(image))) for image in images]).permute(0, 3, 1, 2)
    shares = _bare(done / "prompts").eval()(pixels / 127.5 - 1).softmax(1)  # 32 px as they are, mean and std 0.5
    for one, share in zip(told, shares, strict=True):
        best = share.argsort(descending=True).tolist()
        assert [entry["class"] for entry in one["classes"]] == [NAMES[label] for label in best[:2]]
        assert one["classes"][0]["probability"] == pytest.approx(share[best[0]].item(), abs=1e-5)
    assert main(["predict", str(done), *images]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [one["classes"][0]["class"] for one in told]


def test_the_settings_file_repeats_the_run(done, data, tmp_path):
    words = ["train", str(data), "--output", str(tmp_path), "--config", str(done / "settings.json")]
    assert main(words) == 0
    assert same_prompts(done, tmp_path)
    changed = json.loads((tmp_path / "settings.json").read_text())
    assert changed == json.loads((done / "settings.json").read_text())


def test_flags_come_after_the_settings_file(done, data, tmp_path, capsys):
    words = ["train", str(data), "--output", str(tmp_path), "--config", str(done / "settings.json")]
    assert main([*words, "--seed", "4", "--shared.epochs", "1", "--group.epochs", "0", "--json"]) == 0
    settings = json.loads((tmp_path / "settings.json").read_text())["training"]
    assert (settings["seed"], settings["shared"]["epochs"], settings["batch_size"]) == (4, 1, 16)
    assert set(json.loads(capsys.readouterr().out)) == {"validation", "test"}


def test_phases_apart_are_the_phases_of_one_call(done, data, tmp_path, capsys):
    words = ["train", str(data), *BACKBONE, *SMALL]
    assert main([*words, "--output", str(tmp_path / "first"), "--group.epochs", "0"]) == 0
    first = str(tmp_path / "first" / "prompts")
    second = [*words, "--output", str(tmp_path / "second"), "--shared.epochs", "0"]
    assert main([*second, "--start-from", first]) == 0
    assert same_prompts(done, tmp_path / "second")
    capsys.readouterr()
    assert main(second) == 1
    assert f"start_from is None now and was {first!r}" in capsys.readouterr().err
    others = write_images(tmp_path / "others", [4, 3, 0], seed=5)  # no cats
    words[1] = str(others)
    with pytest.warns(UserWarning, match="the head starts anew"):
        assert main([*words, "--output", str(tmp_path / "third"), "--start-from", first]) == 0
    capsys.readouterr()
    assert main([*second[:-2], "--output", str(tmp_path / "no"), "--start-from", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    wrong = ["--prompt-length", "3", "--start-from", first]
    assert main([*words, "--output", str(tmp_path / "no"), *wrong]) == 1
    assert "(12, 2, 192) (blocks, tokens, width), the adapter's (12, 3, 192)" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_run_that_starts_anew_takes_the_place_of_the_old_one_when_it_is_done(data, tmp_path, monkeypatch, capsys):
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
    assert json.loads(capsys.readouterr().out) == old, "prompts and settings of the run before"
    assert main(other) == 0
    assert json.loads((tmp_path / "settings.json").read_text())["images"]["crop_pct"] == 0.5
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) != old, "else the test proves nothing"


def test_a_settings_file_need_not_name_the_backbone(done, data, tmp_path, capsys):
    values = json.loads((done / "settings.json").read_text())
    for name in ("backbone", "data"):
        del values[name]
    (tmp_path / "settings.json").write_text(json.dumps(values))
    words = ["train", str(data), "--output", str(tmp_path / "run"), "--config", str(tmp_path / "settings.json")]
    with pytest.raises(SystemExit):
        main(words)
    assert "--backbone" in capsys.readouterr().err
    assert main([*words, "--backbone", "vit_tiny_patch16_224"]) == 0
    assert same_prompts(done, tmp_path / "run")


@pytest.mark.parametrize("flags", [["--img-size", "64"], ["--no-pretrained"], ["--backbone-weights", "nowhere"]])
def test_the_bundled_backbone_is_as_it_is(data, tmp_path, capsys, flags):
    assert main(["train", str(data), "--output", str(tmp_path), "--backbone", "glyph_vit", *flags]) == 1
    assert "glyph_vit comes with its weights and is for 32 px" in capsys.readouterr().err


def test_other_images_of_equal_labels_are_another_run(done, data, tmp_path, capsys):
    """The old prompts must not get the new names."""
    shutil.copytree(done, tmp_path / "run")
    others = write_images(tmp_path / "others" / "train", [20, 8, 3])
    before = (tmp_path / "run" / "prompts" / "config.json").read_bytes()
    words = ["--output", str(tmp_path / "run"), *BACKBONE, *SMALL]
    for part in ("val", "test"):
        shutil.copytree(data / part, tmp_path / "others" / part)
    assert main(["train", str(tmp_path / "others"), *words]) == 0, "a copy elsewhere is the same data set"
    (others / "ant" / "0.png").rename(others / "ant" / "00.png")
    assert main(["train", str(tmp_path / "others"), *words]) == 1
    assert "image names_crc32 is" in capsys.readouterr().err
    (others / "ant" / "00.png").rename(others / "ant" / "0.png")
    for part in ("train", "val", "test"):
        if (tmp_path / "others" / part / "bee").exists():
            (tmp_path / "others" / part / "bee").rename(tmp_path / "others" / part / "bug")
    assert main(["train", str(tmp_path / "others"), *words]) == 1
    assert "class names_crc32 is" in capsys.readouterr().err
    assert (tmp_path / "run" / "prompts" / "config.json").read_bytes() == before


def test_what_else_lies_in_the_folder_of_checkpoints_stays(data, tmp_path):
    mine = tmp_path / "checkpoints" / "my_thesis"
    left = tmp_path / "checkpoints" / "mine.tmp"
    for folder in (mine, left):
        folder.mkdir(parents=True)
    words = ["train", str(data), "--output", str(tmp_path), *BACKBONE, *SMALL, "--group.epochs", "0"]
    assert main(words) == 0
    assert main([*words, "--no-resume"]) == 0
    assert mine.exists()
    assert left.exists()


def test_evaluate_measures_the_data_it_is_given(data, tmp_path, capsys):
    words = ["train", str(data), *BACKBONE, *SMALL, "--group.epochs", "0", "--test", str(data / "test")]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    shutil.copytree(data, tmp_path / "other")
    for image in sorted((tmp_path / "other" / "test").rglob("*.png"))[:12]:
        image.unlink()
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), str(tmp_path / "other"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["num_images"] == 3


def test_killed_and_called_again(done, data, tmp_path):
    words = ["train", str(data), "--output", str(tmp_path), *BACKBONE, *SMALL]
    with Child(main_killed_in, "training_step", ("group", 5), words) as child:
        assert child.wait() == -signal.SIGKILL, child.output
    assert main(["evaluate", str(tmp_path)]) == 1
    assert main(words) == 0
    assert same_prompts(done, tmp_path)


def test_control_c_saves_and_says_how_to_go_on(done, data, tmp_path, monkeypatch, capsys):
    original = PhaseRun.training_step

    def interrupted(run, *args):
        if (run.name, run.step) == ("shared", 2):
            os.kill(os.getpid(), signal.SIGINT)
        original(run, *args)

    words = ["train", str(data), "--output", str(tmp_path), *BACKBONE, *SMALL]
    monkeypatch.setattr(PhaseRun, "training_step", interrupted)
    assert main(words) == 130
    told = capsys.readouterr().err
    assert "stopped after step 3 of phase shared" in told
    assert "The same command goes on" in told
    monkeypatch.undo()
    capsys.readouterr()
    before = (tmp_path / "settings.json").read_text()
    assert main([*words, "--flip", "0.5"]) == 1
    assert "images.flip is 0.5 now and was 0.0" in capsys.readouterr().err
    assert (tmp_path / "settings.json").read_text() == before
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "no prompts yet" in capsys.readouterr().err
    assert main(words) == 0
    assert same_prompts(done, tmp_path)


def test_two_processes_train_and_measure_together(data, tmp_path):
    """Only the first one needs the output folder; both halves of a batch are shared out, images counted once."""
    words = ["train", str(data), *BACKBONE, *SMALL, "--head-dropout", "0"]
    assert run_ranks(main_of_rank, words, tmp_path, init=False) == [0, 0]
    assert not (tmp_path / "nobody").exists()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["validation"]["num_images"], results["test"]["num_images"]) == (8, 15)
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    launched = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", *launched, "-m", "lpt_peft", *words]
    done = subprocess.run([*command, "--output", tmp_path / "launched"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert same_prompts(tmp_path / "run", tmp_path / "launched")
    assert done.stdout.count("many: n > 100") == 1, "one process speaks for all"


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
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir(mode=0o500)
    if place == "locked/below" and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    assert main(["train", str(data), "--output", str(tmp_path / place), *BACKBONE, *SMALL]) == 1
    assert f"{tmp_path / place / 'settings.json'} cannot be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_presets(data, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("lpt_peft.cli.train.run_training", lambda data, output, run, **options: seen.append(run))
    words = ["train", str(data), "--output", str(tmp_path), *BACKBONE]
    assert main([*words, "--preset", "inat2018", "--shared.epochs", "3"]) == 0
    [run] = seen
    assert (run.training.shared.epochs, run.training.group.epochs) == (3, 80)
    assert run.training.init_groups == "random"
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
        ("{", "cannot be read"),
        ("[]", "one JSON object"),
        ('{"backbone": "a", "shot_rule": []}', "shot_rule=[] must be one of lift, oltr, lpt"),
        ('{"backbone": "a", "colour": 1}', "RunSettings has no colour"),
        ('{"backbone": "a", "images": {"colour": 1}}', "ImageSettings has no colour"),
        ('{"backbone": "a", "images": {"scale": 1}}', "scale=1 must be two numbers"),
        ('{"backbone": "a", "images": {"flip": "x"}}', "flip='x' must be float"),
        ('{"backbone": "a", "pretrained": 1}', "pretrained=1 must be bool"),
        ('{"backbone": "a", "prompts": 3}', "PromptSettings needs a mapping of names to values"),
        ('{"backbone": "a", "training": {"lr": 1}}', "TrainSettings has no lr"),
    ],
)
def test_settings_files_that_are_none(data, tmp_path, capsys, content, words):
    file = tmp_path / "settings.json"
    file.write_text(content)
    assert main(["train", str(data), "--output", str(tmp_path / "out"), "--config", str(file)]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_run_settings_survive_json():
    run = RunSettings(backbone="a", backbone_weights=Path("w"), images=ImageSettings(root=Path("r"), scale=(0.5, 1.0)))
    assert RunSettings.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_backbones(tmp_path):
    run = RunSettings(backbone="vit_tiny_patch16_224", pretrained=False, img_size=32)
    one, two = (build_backbone(run).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one), "random weights repeat with the seed"
    changed = {name: tensor + 1 for name, tensor in one.items()}
    save_file(changed, tmp_path / "w.safetensors")
    given = RunSettings(backbone="vit_tiny_patch16_224", backbone_weights=tmp_path / "w.safetensors", img_size=32)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in build_backbone(given).state_dict().items())
    with pytest.raises(BackboneError, match="no model .*Near it: .*vit_tiny_patch16_224"):
        build_backbone(RunSettings(backbone="vit_tiny_patch16_22"))
    with pytest.raises(BackboneError, match="cannot be had: .*--backbone-weights FILE.*--no-pretrained"):
        build_backbone(RunSettings(backbone="vit_tiny_patch16_224.augreg_in21k", img_size=32))  # offline
    with pytest.raises(BackboneError, match="cannot build"):
        build_backbone(RunSettings(backbone="vit_tiny_patch16_224", pretrained=False, img_size=-5))


def test_lists_and_annotations(data, tmp_path):
    for part in ("train", "test"):
        files = sorted((data / part).rglob("*.png"))
        lines = [f"{file.relative_to(data)} {NAMES.index(file.parent.name)}\n" for file in files]
        (tmp_path / f"{part}.txt").write_text("".join(lines))
        images = [{"id": n, "file_name": str(file.relative_to(data))} for n, file in enumerate(files)]
        notes = [{"image_id": n, "category_id": NAMES.index(file.parent.name)} for n, file in enumerate(files)]
        names = [{"id": n, "name": name} for n, name in enumerate(NAMES)]
        content = {"images": images, "annotations": notes, "categories": names}
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
    for kind in ("txt", "json"):
        images = ImageSettings(root=data, test=tmp_path / f"test.{kind}")
        parts = open_parts(str(tmp_path / f"train.{kind}"), images, 0)
        assert {name: part.class_counts for name, part in parts.items()} == {"train": [20, 8, 3], "test": [5, 5, 5]}
        classes = parts["train"].class_names
        [(name, part)] = open_test_parts(str(tmp_path / f"test.{kind}"), ImageSettings(root=data), 0, classes).items()
        assert (name, part.class_counts) == ("test", [5, 5, 5])


def test_folders(data, tmp_path):
    parts = open_parts(str(data), ImageSettings(), 0)
    assert {name: part.class_counts for name, part in parts.items()} == {
        "train": [20, 8, 3],
        "validation": [4, 4, 0],
        "test": [5, 5, 5],
    }
    parts = open_parts(str(data / "train"), ImageSettings(validation_share=0.25, test=data / "test"), 0)
    assert {name: part.class_counts for name, part in parts.items()} == {
        "train": [15, 6, 3],
        "validation": [5, 2, 0],
        "test": [5, 5, 5],
    }
    write_images(tmp_path / "train", [2, 2, 2])  # a class called "train" beside others is a class
    write_images(tmp_path / "bus", [2, 2, 2])
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert open_parts(str(tmp_path), ImageSettings(), 0)["train"].class_names == ["bus", "train"]
    write_images(tmp_path / "test", [2, 2, 2])  # with a test part it is the training part
    parts = open_parts(str(tmp_path), ImageSettings(), 0)
    assert {name: part.class_names for name, part in parts.items()} == {"train": NAMES, "test": NAMES}
    for name in ("val", "valid"):
        write_images(tmp_path / name, [2, 2, 2])
    with pytest.raises(InputError, match="val and .*valid are for the same part"):
        open_parts(str(tmp_path), ImageSettings(), 0)
    for name in ("train", "bus", "valid"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(InputError, match="holds val, test, but no train"):
        open_parts(str(tmp_path), ImageSettings(), 0)
    with pytest.raises(InputError, match="neither a folder nor a file"):
        open_parts(str(tmp_path / "nowhere"), ImageSettings(), 0)
    with pytest.raises(InputError, match="classes of .* are not those the model"):
        open_test_parts(str(data), ImageSettings(), 0, ["ant", "bee", "dog"])
    with pytest.raises(InputError, match="folders that are no class"):
        open_test_parts(str(data / "test"), ImageSettings(), 0, ["ant", "bee", "dog"])


@pytest.mark.parametrize(
    ("word", "name", "imbalance"),
    [
        ("cifar100-lt:/a", "cifar100", 100),
        ("cifar100-lt-50:/a", "cifar100", 50),
        ("cifar10-lt:/a", "cifar10", 100),
    ],
)
def test_cifar(monkeypatch, word, name, imbalance):
    seen = []
    monkeypatch.setattr(
        "lpt_peft.cli.common.open_data.cifar_lt", lambda *args, **options: seen.append((args, options["train"]))
    )
    assert set(open_parts(word, ImageSettings(), 0)) == {"train", "test"}
    assert seen == [(("/a", name, imbalance), True), (("/a", name, imbalance), False)]


def test_data_sets_of_hugging_face(data, done, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    names = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})

    def split(part):
        files = sorted((data / part).rglob("*.png"))
        labels = [NAMES.index(file.parent.name) for file in files]
        return datasets.Dataset.from_dict({"image": [str(file) for file in files], "label": labels}, features=names)

    splits = {name: split(part) for name, part in (("train", "train"), ("validation", "val"), ("test", "test"))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    source = f"hf:{tmp_path / 'saved'}"
    assert main(["train", source, "--output", str(tmp_path / "run"), *BACKBONE, *SMALL]) == 0
    assert same_prompts(done, tmp_path / "run")
    capsys.readouterr()
    for words in (["evaluate", str(tmp_path / "run"), "--json"], ["evaluate", str(done), source, "--json"]):
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out) == json.loads((done / "results.json").read_text())
    splits["train"].save_to_disk(tmp_path / "one")
    assert set(open_parts(f"hf:{tmp_path / 'one'}", ImageSettings(validation_share=0.25), 0)) == {"train", "validation"}
    unlabelled = splits["test"].map(lambda row: {"label": -1})
    datasets.DatasetDict(train=splits["train"], test=unlabelled).save_to_disk(tmp_path / "unlabelled")
    with pytest.warns(UserWarning, match='split "test" of .* is left out: labels must be at least 0'):
        parts = open_parts(f"hf:{tmp_path / 'unlabelled'}", ImageSettings(val=data / "val"), 0)
    assert {name: part.class_counts for name, part in parts.items()} == {"train": [20, 8, 3], "validation": [4, 4, 0]}
    datasets.DatasetDict(test=splits["test"]).save_to_disk(tmp_path / "tests")
    with pytest.raises(InputError, match='has no split "train"; it has test'):
        open_parts(f"hf:{tmp_path / 'tests'}", ImageSettings(), 0)
    with pytest.raises(InputError, match="hf:nobody/nothing cannot be loaded"):
        open_parts("hf:nobody/nothing", ImageSettings(), 0)


def test_split_by_brute_force():
    labels = [0] * 10 + [1] * 4 + [2] * 3
    train, held = split_validation(labels, 0.25, seed=3)
    assert sorted(train + held) == list(range(17))
    assert [sum(labels[i] == label for i in held) for label in range(3)] == [2, 1, 0]
    assert split_validation(labels, 0.25, seed=3) == (train, held)
    assert any(split_validation(labels, 0.25, seed=seed)[1] != held for seed in range(5))
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        split_validation(labels, 1.0)
    with pytest.raises(ConfigError, match="less than one image"):
        split_validation(labels, 0.05)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["predict", "RUN", "broken.png"], "broken.png cannot be read as an image"),
        (["predict", "RUN", "nowhere.png"], "nowhere.png cannot be read"),
        (["predict", "RUN", "nowhere.png", "--top-k", "4"], "from 1 to 3"),
        (["predict", "RUN"], "needs images"),
        (["predict", "nowhere", "a.png"], "nowhere"),
        (["evaluate", "RUN/prompts"], "does not tell what it was trained on"),
    ],
)
def test_refusals(done, tmp_path, capsys, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_text("no picture")
    if words[1] == "RUN/prompts":  # a prompt file alone: timm has no weights for this one
        monkeypatch.setattr(
            "lpt_peft.cli.common.load_run.LongTailPromptAdapter.from_pretrained", lambda folder: _bare(done / "prompts")
        )
    assert main([word.replace("RUN", str(done)) for word in words]) == 1
    assert told in capsys.readouterr().err


def _bare(folder):
    run = RunSettings(backbone="vit_tiny_patch16_224", pretrained=False, img_size=32)
    return load_prompts(folder, build_backbone(run))


def test_without_the_extra_only_these_commands_fail(tmp_path, done):
    commands = [["train", "x", "--output", "y", *BACKBONE], ["evaluate", "x"], ["predict", "x"]]
    program = (  # a process of its own: modules that are there already would stay
        "import sys\n"
        "sys.modules['accelerate'] = None\n"
        "from lpt_peft.cli import main\n"
        f"for words in {commands}: assert main(words) == 1\n"
        f"assert main(['inspect', {str(done / 'prompts')!r}]) == 0\n"
        "main(['train', '--help'])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines() == [
        f'lpt-peft: lpt-peft {words[0]} needs accelerate: pip install "lpt_peft[train]".' for words in commands
    ]
    assert "All checks passed" in run.stdout
    assert "usage: lpt-peft train" in run.stdout
    assert list(tmp_path.iterdir()) == []
