"""`lpt-peft check` and `train` on 300 photos among which 20 kinds of trouble are planted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lpt_peft.cli import main
from tests.cli.runs import SMALL

COUNTS = {"china": 180, "flower": 90, "negative": 30}
GLYPH = ["--backbone", "glyph_vit", *SMALL, "--batch-size", "64", "--shared.epochs", "6", "--group.epochs", "1"]
GLYPH += ["--flip", "0.5", "--shared.learning-rate", "1"]


def crops(number, seed):
    """Crops (H, W, 3) of two photos that scikit-learn ships."""
    photos = [np.asarray(image) for image in pytest.importorskip("sklearn.datasets").load_sample_images().images]
    generator = np.random.default_rng(seed)

    def crop(photo):
        top, left = (int(generator.integers(0, size - 200)) for size in photo.shape[:2])
        return photo[top : top + 200 : 4, left : left + 200 : 4]

    for index in range(number):
        china, flower = crop(photos[0]), crop(photos[1])
        yield {"china": china, "flower": flower, "negative": 255 - flower}, index


def write(folder, counts, seed):
    for images, index in crops(max(counts.values()), seed):
        for name, count in counts.items():
            if index < count:
                (folder / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[name]).save(folder / name / f"{index:03}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The folder, names of files that are not images or copies of images, and names of unreadable images."""
    root = tmp_path_factory.mktemp("photos with trouble")
    folder = root / "my photos" / "train"
    write(folder, COUNTS, seed=0)
    write(root / "my photos" / "test", {"china": 20, "flower": 20, "negative": 20}, seed=1)
    left_out, unreadable = set(), set()

    def leave_out(path, content=b"x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        left_out.add(path.relative_to(folder).as_posix())

    china, flower, negative = (folder / name for name in COUNTS)
    # Files and folders that are not images of a class
    leave_out(china / "._000.png")
    leave_out(china / "Thumbs.db")
    (china / ".ipynb_checkpoints").mkdir()
    (china / ".ipynb_checkpoints" / "000-checkpoint.png").write_bytes((china / "000.png").read_bytes())
    left_out.add("china/.ipynb_checkpoints")
    (folder / "__MACOSX" / "china").mkdir(parents=True)
    (folder / "__MACOSX" / "china" / "._1.png").write_bytes(b"x")
    left_out.add("__MACOSX")
    leave_out(flower / "notes.txt")
    leave_out(flower / "IMG_0001.HEIC")
    leave_out(negative / "clip.mp4")
    leave_out(folder / "labels.csv")
    (negative / "loop").symlink_to(folder)
    left_out.add("negative/loop")
    (flower / "again.png").symlink_to(flower / "000.png")
    left_out.add("flower/again.png")
    (flower / "gone.png").symlink_to(flower / "nowhere.png")
    left_out.add("flower/gone.png")
    # Images of other kinds, in the place of ordinary ones
    photo = Image.open(china / "001.png").convert("RGB")
    (china / "001.png").unlink()
    rotated = Image.Exif()
    rotated[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(china / "001.jfif", "JPEG", exif=rotated, quality=95)
    for name, number, mode in (("flower", 2, "RGBA"), ("flower", 3, "L"), ("flower", 4, "P"), ("china", 5, "CMYK")):
        path = folder / name / f"{number:03}.png"
        image = Image.open(path).convert(mode)
        path.unlink()
        image.save(path.with_suffix(".tif" if mode == "CMYK" else ".gif" if mode == "P" else ".png"))
    deep = np.asarray(Image.open(china / "006.png").convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(china / "006.png")
    (china / "007.png").rename(china / "sept é 日本 [1].PNG")
    (flower / "nested" / "deeper").mkdir(parents=True)
    (flower / "008.png").rename(flower / "nested" / "deeper" / "008.png")
    # Unreadable images, which still count
    whole = (china / "010.png").read_bytes()
    (china / "010.png").write_bytes(whole[: len(whole) // 2])
    (flower / "011.png").write_bytes(b"")
    (negative / "012.png").write_bytes(b"<!DOCTYPE html><html></html>")
    unreadable |= {"china/010.png", "flower/011.png", "negative/012.png"}
    # The same photo in two classes
    (negative / "013.png").write_bytes((flower / "013.png").read_bytes())
    # A test split of the same folder without labels is not read: test/ has labels, unlabelled/ is not a split.
    return folder.parent, left_out, unreadable


def test_check_lists_every_file(photos, capsys):
    folder, left_out, unreadable = photos
    assert main(["check", str(folder), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    train = report["splits"]["train"]
    assert (train["images"], train["largest"]) == (300, {"class": "china", "images": 180})
    listed = {name.rstrip("/") for reason in train["left_out"] for name in reason["files"]}
    assert listed == left_out
    found = {}
    for finding in report["findings"]:
        names = {re.sub(r"^\w+: ", "", name).removeprefix(f"{folder}/train/") for name in finding["files"]}
        found.setdefault(finding["kind"], set()).update(names)
    assert found["truncated"] == {"china/010.png"}
    assert found["not an image"] == {"flower/011.png", "negative/012.png"}
    assert found["rotated"] == {"china/001.jfif"}
    assert found["transparent"] == {"flower/002.png"}
    assert found["deep"] == {"china/006.png"}
    assert found["mode"] == {"china/005.tif"}
    assert found["duplicate in several classes"] == {"negative/013.png", "flower/013.png"}
    assert report["readable"] is False
    assert main(["check", str(folder)]) == 3
    out = capsys.readouterr().out
    assert all(name in out for name in left_out | unreadable)
    assert "train: 300 images of 3 classes" in out


def test_check_of_clean_images(photos, tmp_path, capsys):
    write(tmp_path, {"china": 3, "flower": 2}, seed=5)
    (tmp_path / "china" / ".DS_Store").write_bytes(b"x")
    assert main(["check", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["findings"] == []
    assert report["readable"] is True
    assert main(["check", str(tmp_path / "china" / "000.png")]) == 1
    assert "is an image" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """A run in a real process without a terminal: output folder and both streams."""
    output = tmp_path_factory.mktemp("runs") / "a run"
    command = [sys.executable, "-m", "lpt_peft", "train", photos[0], "--output", output, *GLYPH]
    done = subprocess.run(
        [*command, "--unreadable", "skip", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 3, done.stderr
    return output, done.stdout, done.stderr


def test_training_ends_with_a_right_model(finished, photos, capsys):
    output, out, _ = finished
    results = json.loads(out)
    assert results["test"]["num_images"] == 60
    assert results["test"]["overall"] > 0.8, "by chance 0.33"
    assert main(["inspect", str(output), "--json"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert dict(zip(config["head"]["label_names"], config["class_counts"], strict=True)) == COUNTS
    assert (config["preprocess"]["exif"], config["preprocess"]["background"]) == (True, [255, 255, 255])
    for source in (output, output / "prompts"):
        assert main(["evaluate", str(source), str(photos[0]), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == results


def test_training_begins_with_a_right_summary_and_names_every_unreadable_file(finished, photos):
    _, _, err = finished
    folder, left_out, unreadable = photos
    assert "Training: 300 images of 3 classes; largest class china (180), smallest class negative (30)" in err
    assert "Test: 60 images of 3 classes" in err
    assert sum(int(count) for count in re.findall(r"^(\d+) left out: ", err, re.MULTILINE)) == len(left_out)
    assert "Phases: shared 6 epochs, group 1 epoch; 10 steps per epoch, 70 steps of 64 images" in err
    assert "\nDevice: " in err
    assert "3 of 300 images cannot be read" in err
    assert all(f"{folder}/train/{name}" in err for name in unreadable)
    assert err.count("images cannot be read") == 1, "once, at the end"
    listed = json.loads((finished[0] / "left_out.json").read_text())
    assert set(listed) == {"train"}
    assert listed["train"]["unreadable"]["files"] == sorted(f"{folder}/train/{name}" for name in unreadable)
    assert {name.rstrip("/") for entry in listed["train"]["left_out"] for name in entry["files"]} == left_out
    assert "UserWarning" not in err
    assert len(re.findall(r"^shared: epoch \d/6", err, re.MULTILINE)) == 6, "a line per epoch"
    assert "\r" not in err, "no progress bar"


def test_an_unreadable_image_stops_a_run_that_does_not_skip(photos, tmp_path, capsys):
    words = [*GLYPH, "--shared.epochs", "1", "--group.epochs", "0"]
    assert main(["train", str(photos[0]), "--output", str(tmp_path / "run"), *words]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert any(name in err for name in photos[2])
    assert "cannot be read" in err


def test_predict_reads_images_as_the_training_does(finished, photos, tmp_path, capsys):
    """The same photo upright, and stored on its side with an EXIF orientation."""
    output, folder = finished[0], photos[0]
    photo = Image.open(folder / "train" / "china" / "020.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    photo.save(tmp_path / "upright.png")
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=rotated)
    names = [str(tmp_path / "upright.png"), str(tmp_path / "side.png")]
    for source in (output, output / "prompts"):
        assert main(["predict", str(source), *names, "--json"]) == 0
        upright, side = json.loads(capsys.readouterr().out)
        assert upright["classes"] == side["classes"]
