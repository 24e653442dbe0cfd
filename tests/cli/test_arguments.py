"""Arguments: home directories, values out of range, misspelt names, unusable data."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpt_peft.cli import main
from lpt_peft.cli.common.paths import expand_home
from lpt_peft.cli.common.run_settings import ImageSettings, RunSettings
from tests.cli.runs import NAMES, SMALL, write_images

GLYPH = ["--backbone", "glyph_vit", *SMALL, "--shared.epochs", "1", "--group.epochs", "0"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("~", "/home/me"),
        ("~/x y", "/home/me/x y"),
        ("--output=~/x", "/home/me/x"),
        ("--images.root=~", "/home/me"),
        ("hf:~/data", "hf:/home/me/data"),
        ("cifar100-lt-50:~/cifar", "cifar100-lt-50:/home/me/cifar"),
        ("~\n/x", "~\n/x"),
        ("~root/x", "~root/x"),
        ("a~/x", "a~/x"),
        ("./~", "./~"),
        ("$HOME/x", "$HOME/x"),
        ("--message=see ~/x", "--message=see ~/x"),
        ("", ""),
    ],
)
def test_home_directories(monkeypatch, word, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    option = word.partition("=")[0] + "=" if word.startswith("--") and "message" not in word else ""
    assert expand_home([word]) == [option + expected]


@given(st.text())
def test_other_words_stay(word):
    if "~" not in word:
        assert expand_home([word]) == [word]


def test_home_directories_in_every_command(pair_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pair_run.parent / "data", tmp_path / "data")
    image = next((tmp_path / "data").rglob("*.png")).relative_to(tmp_path)
    assert main(["train", "~/data", "--output=~/run", *GLYPH, "--test=~/data"]) == 0
    assert (tmp_path / "run" / "results.json").exists()
    assert main(["evaluate", "~/run", "~/data"]) == 0
    assert main(["predict", "~/run", f"~/{image}"]) == 0
    assert main(["inspect", "~/run/prompts"]) == 0
    assert main(["check", "~/data", "--test=~/data"]) == 3
    settings = {"backbone": "glyph_vit", "start_from": "~/run", "images": {"val": "~/data"}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    words = [*GLYPH, "--test", "None"]
    assert main(["train", "~/data", "--output=~/second", "--config=~/settings.json", *words]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"data", "run", "second", "settings.json"}
    settings = json.loads((tmp_path / "second" / "settings.json").read_text())
    assert settings["images"]["val"] == str(tmp_path / "data")
    assert settings["start_from"] == str(tmp_path / "run")


BAD_FLAGS = [
    ("--validation-share", "2", "--validation-share 2.0 must be a share of at least 0 and below 1"),
    ("--validation-share", "1", "--validation-share 1.0 must be"),
    ("--validation-share", "-0.1", "--validation-share -0.1 must be"),
    ("--validation-share", "nan", "--validation-share nan must be"),
    ("--flip", "1.5", "--flip 1.5 must be a probability from 0 to 1"),
    ("--crop-pct", "0", "--crop-pct 0.0 must be from 0.05 to 1"),
    ("--scale", "0.5 0.2", "--scale (0.5, 0.2) must be two shares"),
    ("--ratio", "0 1", "--ratio (0.0, 1.0) must be two values"),
    ("--background", "0 0 256", "three integers from 0 to 255"),
    ("--prompt-length", "0", "--prompt-length 0 must be at least 1"),
    ("--pool-size", "0", "--pool-size 0 must be at least 1"),
    ("--top-k", "21", "--top-k 21 must be from 1 to pool_size=20"),
    ("--top-k", "0", "--top-k 0 must be from 1 to pool_size=20"),
    ("--shared-layers", "-1", "--shared-layers -1 must be at least 1, or 0 with"),
    ("--head-dropout", "1", "--head-dropout 1.0 must be at least 0 and below 1"),
    ("--logit-scale", "inf", "--logit-scale inf must be above 0 and finite"),
    ("--img-size", "0", "--img-size 0 must be at least 1"),
    ("--backbone", "", "--backbone '' must be a name"),
    ("--batch-size", "0", "--batch-size 0 must be"),
    ("--seed", "-1", "--seed -1 must be from 0"),
    ("--shared.epochs", "-1", "--shared.epochs -1 must be at least 0."),
    ("--group.epochs", "-1", "--group.epochs -1 must be at least 0."),
    ("--group.learning-rate", "nan", "--group.learning-rate nan must be None, or above 0 and finite."),
    ("--shared.learning_rate", "inf", "--shared.learning_rate inf must be None, or above 0 and finite."),
    ("--group.momentum", "1", "--group.momentum 1 must be at least 0 and below 1."),
    ("--shared.warmup", "2", "--shared.warmup 2 must be a fraction from 0 to 1."),
    ("--shared.head-learning-rate", "0", "--shared.head-learning-rate 0 must be None, or above 0 and finite."),
    ("--weight-noise", "-0.1", "--weight-noise -0.1 must be at least 0 and finite"),
    ("--clip-norm", "0", "--clip-norm 0.0 must be None or above 0"),
]


@pytest.mark.parametrize(("flag", "value", "message"), BAD_FLAGS)
def test_values_out_of_range_are_refused_before_anything_is_loaded(tmp_path, capsys, flag, value, message):
    words = ["train", str(tmp_path / "no data"), "--output", str(tmp_path / "run"), "--backbone", "no model"]
    assert main([*words, flag, *(value.split() or [""])]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Settings" not in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["doctor", "no model", "--num-classes", "0"], "--num-classes 0 must be at least 1"),
        (["doctor", "no model", "--prompt-length", "-3"], "--prompt-length -3 must be at least 1"),
        (["doctor", "no model", "--pool-size", "0"], "--pool-size 0 must be at least 1"),
        (["predict", "no run", "no image", "--show", "-1"], "--show -1 must be at least 1"),
        (["demo", "--seeds", "0"], "at least 1 seed"),
        (["demo", "--epochs", "1"], "at least 2 epochs"),
    ],
)
def test_values_out_of_range_of_other_commands(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_defaults_are_in_range():
    RunSettings(backbone="glyph_vit").check()
    RunSettings(backbone="glyph_vit", images=ImageSettings(validation_share=0.999, flip=0, crop_pct=1)).check()


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("vit_base_patch16_22", "vit_base_patch16_224"),
        ("vit_bse_patch16_224", "vit_base_patch16_224"),
        ("glif_vit", "glyph_vit"),
        ("vit_b_16", "torchvision/vit_b_16"),
        ("torchvision/vit_b_61", "torchvision/vit_b_16"),
        ("open_clip/ViT-B-23", "open_clip/ViT-B-32"),
        ("vit_tiny_patch16_224.augreg_in21kk", "augreg_in21k"),
    ],
)
def test_misspelt_backbones_get_suggestions_without_a_network(data, tmp_path, capsys, monkeypatch, name, similar):
    def refuse(*args, **options):
        raise AssertionError("a network connection")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    words = ["train", str(data), "--output", str(tmp_path / "run"), "--backbone", name]
    assert main(words) == 1
    assert similar in capsys.readouterr().err
    if "augreg" not in name:
        assert main(["doctor", name]) == 1
        assert similar in capsys.readouterr().err


@pytest.mark.parametrize(
    "backbone", ["torchvision/vit_b_32", "transformers/dinov2", "open_clip/ViT-S-32", "timm/test_vit"]
)
def test_backbones_of_every_library(tmp_path, capsys, backbone):
    pytest.importorskip(backbone.partition("/")[0])
    data = write_images(tmp_path / "data", [3, 2, 2])
    words = ["--backbone", backbone, "--no-pretrained", *SMALL, "--shared.epochs", "1", "--group.epochs", "0"]
    words += ["--batch-size", "4"] + (
        ["--img-size", "32"] if backbone != "transformers/dinov2" else ["--img-size", "28"]
    )
    assert main(["train", str(data), "--output", str(tmp_path / "run"), *words]) == 0
    image = str(data / NAMES[0] / "0.png")
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), image, "--json"]) == 0
    [answer] = json.loads(capsys.readouterr().out)
    assert {entry["class"] for entry in answer["classes"]} == set(NAMES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is neither a folder nor a file"),
        (lambda path: path.mkdir(), "has no class folder"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n"), "is an image"),
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: write_images(path, [4, 0, 0]), "same class"),
        (lambda path: (path / "a").mkdir(parents=True), "contain no image"),
    ],
    ids=["missing", "empty", "an image", "empty file", "one class", "empty class"],
)
def test_unusable_data(tmp_path, capsys, make, message):
    path = tmp_path / "some data\n日本.PNG"
    if message == "is empty":
        path = path.with_suffix(".txt")
    make(path)
    assert main(["train", str(path), "--output", str(tmp_path / "run"), *GLYPH]) == 1
    err = capsys.readouterr().err
    assert message in err, err
    assert err.count("\n") == 1
    assert "[Errno" not in err
    assert not (tmp_path / "run").exists()


def test_unusual_paths(pair_run, tmp_path, capsys):
    folder = tmp_path / "a folder\\with\nlines and 日本"
    shutil.copytree(pair_run.parent / "data", folder)
    assert main(["train", str(folder), "--output", str(tmp_path / "a run\n日本"), *GLYPH, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {}
    assert main(["evaluate", str(tmp_path / "a run\n日本"), str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["num_images"] == 18


def test_json_of_every_command(pair_run, capfd, tmp_path):
    """Standard output holds one JSON document and nothing else; progress and summaries are on standard error."""
    data = pair_run.parent / "data"
    image = str(next(data.rglob("*.png")))
    commands = [
        ["train", str(data), "--output", str(tmp_path / "run"), *GLYPH, "--validation-share", "0.3"],
        ["evaluate", str(tmp_path / "run")],
        ["evaluate", str(pair_run), str(data)],
        ["predict", str(pair_run), image],
        ["inspect", str(pair_run / "prompts")],
        ["doctor", "glyph_vit"],
        ["doctor", "resnet18"],
        ["doctor", "--list", "glyph*"],
        ["check", str(data)],
    ]
    for words in commands:
        main([*words, "--json"])
        streams = capfd.readouterr()
        json.loads(streams.out)
        if words[0] == "train":
            assert "Training: 14 images of 2 classes; largest class été (9), smallest class 日本 (5)" in streams.err
            assert "Device: " in streams.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvison/vit_b_16", 'There is no library "torchvison". Did you mean torchvision/vit_b_16?'),
        ("open-clip/ViT-B-32", "Did you mean open_clip/ViT-B-32?"),
        ("Transformer/dinov2", "Did you mean transformers/dinov2?"),
        ("ViT-B/16", "torchvision/vit_b_16"),
        ("hf-hub:timm/vit_tiny", "name of its model in timm, such as vit_tiny; or transformers/OWNER/NAME"),
    ],
)
def test_misspelt_libraries(pair_run, tmp_path, capsys, name, message):
    data = str(pair_run.parent / "data")
    for words in (["doctor", name], ["train", data, "--output", str(tmp_path / "run"), "--backbone", name]):
        assert main(words) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_no_backbone(pair_run, capsys):
    for folder in (pair_run, pair_run / "prompts"):
        assert main(["doctor", str(folder)]) == 1
        assert f"lpt-peft inspect {folder} names its backbone" in capsys.readouterr().err


def test_the_weights_name_their_prompt_file(pair_run, capsys):
    assert main(["inspect", str(pair_run / "prompts" / "prompts.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "All checks passed" in out
    assert "  training        recipe.batch_size 16\n" in out
    image = next((pair_run.parent / "data").rglob("*.png"))
    assert main(["predict", str(pair_run / "prompts" / "prompts.safetensors"), str(image)]) == 0


def test_the_home_directory_of_an_unknown_user(pair_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [
        ["train", str(pair_run.parent / "data"), *GLYPH, "--output", "~nosuchuser/run"],
        ["train", str(pair_run.parent / "data"), *GLYPH, "--output=~nosuchuser/run"],
        ["demo", "--output", "~nosuchuser/run"],
        ["pull", "owner/name", "~nosuchuser/run", "--offline"],
        ["convert", "a.pth", "~nosuchuser/run"],
    ]
    for words in commands:
        assert main(words) == 1
        assert "~nosuchuser/run: the home directory ~nosuchuser is unknown" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_files_that_convert_does_not_take(tmp_path, capsys):
    for name in ("photo.jpg", "random.bin"):
        (tmp_path / name).write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)))
        assert main(["convert", str(tmp_path / name), str(tmp_path / "out")]) == 1
        err = capsys.readouterr().err
        assert f"{tmp_path / name} is not a checkpoint of the paper's program: torch cannot load it" in err
        assert "KeyError" not in err
    assert main(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "out")]) == 1
    assert "A prompt file needs no conversion" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
