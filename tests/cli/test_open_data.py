"""The kinds of DATA and their splits."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lpt_peft.cli import main
from lpt_peft.cli.common.open_data import check_output, open_splits, open_test_splits
from lpt_peft.cli.common.run_settings import ImageSettings
from lpt_peft.data.images import LabelledImages
from lpt_peft.data.sources import ArrayImages
from lpt_peft.errors import InputError
from tests.cli.runs import BACKBONE, NAMES, SMALL, same_prompts, write_images


def counts(splits):
    return {name: split.class_counts for name, split in splits.items()}


def test_lists_and_annotations(data, tmp_path):
    for split in ("train", "test"):
        files = sorted((data / split).rglob("*.png"))
        lines = [f"{file.relative_to(data)} {NAMES.index(file.parent.name)}\n" for file in files]
        (tmp_path / f"{split}.txt").write_text("".join(lines))
        images = [{"id": n, "file_name": str(file.relative_to(data))} for n, file in enumerate(files)]
        notes = [{"image_id": n, "category_id": NAMES.index(file.parent.name)} for n, file in enumerate(files)]
        names = [{"id": n, "name": name} for n, name in enumerate(NAMES)]
        content = {"images": images, "annotations": notes, "categories": names}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    for kind in ("txt", "json"):
        images = ImageSettings(root=data, test=tmp_path / f"test.{kind}")
        splits = open_splits(str(tmp_path / f"train.{kind}"), images, 0)
        assert counts(splits) == {"train": [20, 8, 3], "test": [5, 5, 5]}
        classes = splits["train"].class_names
        [(name, split)] = open_test_splits(str(tmp_path / f"test.{kind}"), ImageSettings(root=data), 0, classes).items()
        assert (name, split.class_counts) == ("test", [5, 5, 5])


def test_folders(data, tmp_path):
    splits = open_splits(str(data), ImageSettings(), 0)
    assert counts(splits) == {
        "train": [20, 8, 3],
        "validation": [4, 4, 0],
        "test": [5, 5, 5],
    }
    splits = open_splits(str(data / "train"), ImageSettings(validation_share=0.25, test=data / "test"), 0)
    assert counts(splits) == {
        "train": [15, 6, 3],
        "validation": [5, 2, 0],
        "test": [5, 5, 5],
    }
    write_images(tmp_path, [2, 2], names=["train", "bus"])  # train/ with images among other classes is a class
    (tmp_path / ".ipynb_checkpoints").mkdir()
    train = open_splits(str(tmp_path), ImageSettings(), 0)["train"]
    assert train.class_names == ["bus", "train"]
    assert "note: class folders with the name of a split: 'train'" in str(train.summary)
    shutil.rmtree(tmp_path / "train")
    write_images(tmp_path / "train", [2, 2, 2])
    with pytest.raises(InputError, match=r"bus, train, of which train look like splits.* Pass .*/train, or class_n"):
        open_splits(str(tmp_path), ImageSettings(), 0)
    write_images(tmp_path / "test", [2, 2, 2])  # train/ with test/ is a split
    splits = open_splits(str(tmp_path), ImageSettings(), 0)
    assert {name: split.class_names for name, split in splits.items()} == {"train": NAMES, "test": NAMES}
    for name in ("val", "valid"):
        write_images(tmp_path / name, [2, 2, 2])
    with pytest.raises(InputError, match="val and .*valid are for the same split: keep a single"):
        open_splits(str(tmp_path), ImageSettings(), 0)
    for name in ("train", "bus", "valid"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(InputError, match="holds val, test, but no train"):
        open_splits(str(tmp_path), ImageSettings(), 0)
    with pytest.raises(InputError, match="neither a folder nor a file"):
        open_splits(str(tmp_path / "nowhere"), ImageSettings(), 0)
    with pytest.raises(InputError, match="classes of .* are not those the model"):
        open_test_splits(str(data), ImageSettings(), 0, ["ant", "bee", "dog"])
    with pytest.raises(InputError, match="folders that are missing in class_names"):
        open_test_splits(str(data / "test"), ImageSettings(), 0, ["ant", "bee", "dog"])


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (["train"], {"train"}),
        (["Train", "Test"], {"train", "test"}),
        (["training", "testing"], {"train", "test"}),
        (["TRAIN", "VAL"], {"train", "validation"}),
        (["train", "eval", "test_set"], {"train", "validation", "test"}),
        (["train2017", "val2017"], {"train", "validation"}),
        (["images_train", "dev"], {"train", "validation"}),
    ],
)
def test_names_of_splits_beside_entries_of_a_system(tmp_path, folders, found):
    for folder in folders:
        write_images(tmp_path / folder, [3, 2, 1])
    for name in ("__MACOSX", ".git", "@eaDir"):
        write_images(tmp_path / name / folders[0], [1, 1, 1])
    splits = open_splits(str(tmp_path), ImageSettings(), 0)
    assert counts(splits) == {name: [3, 2, 1] for name in found}
    left_out = splits["train"].summary.left_out
    assert {Path(name).name for name in left_out["hidden or system entry"]} == {"__MACOSX", ".git", "@eaDir"}


def test_entries_beside_the_splits_are_named(tmp_path):
    for folder in ("train", "test", "misc"):
        write_images(tmp_path / folder, [2, 2, 2])
    (tmp_path / "labels.csv").touch()
    splits = open_splits(str(tmp_path), ImageSettings(validation_share=0.5), 0)
    assert counts(splits) == {"train": [1, 1, 1], "validation": [1, 1, 1], "test": [2, 2, 2]}
    assert splits["train"].summary.left_out == {
        "outside the splits": [str(tmp_path / "labels.csv"), str(tmp_path / "misc")]
    }


@pytest.mark.parametrize("folders", [["Train", "misc"], ["train", "other", "more"], ["bus", "car", "test"]])
def test_a_folder_of_class_folders_is_not_a_class(tmp_path, folders):
    for folder in folders:
        write_images(tmp_path / folder, [2, 2, 2])
    with pytest.raises(InputError, match=f"{next(n for n in folders if 't' in n.lower())}.* look like splits"):
        open_splits(str(tmp_path), ImageSettings(), 0)


def test_training_images_in_other_splits_are_noted(data, tmp_path):
    (tmp_path / "link").symlink_to(data / "train")
    for val in (data / "train", tmp_path / "link", data / "train" / ".." / "train"):
        splits = open_splits(str(data / "train"), ImageSettings(val=val, test=data / "test"), 0)
        assert "note: all 31 images are also training images, such as " in str(splits["validation"].summary)
        assert not splits["test"].summary.notes
    files = [f"train/{name}/{number}.png {label}\n" for label, name in enumerate(NAMES) for number in range(3)]
    (tmp_path / "train.txt").write_text("".join(files))
    (tmp_path / "val.txt").write_text("".join([*files[:2], "val/ant/0.png 0\n"]))
    splits = open_splits(str(tmp_path / "train.txt"), ImageSettings(root=data, val=tmp_path / "val.txt"), 0)
    assert "note: 2 of 3 images are also training images, such as " in str(splits["validation"].summary)


@pytest.mark.parametrize(
    ("source", "name", "imbalance"),
    [
        ("cifar100-lt:/a", "cifar100", 100),
        ("cifar100-lt-50:/a", "cifar100", 50),
        ("cifar10-lt:/a", "cifar10", 100),
    ],
)
def test_cifar(monkeypatch, source, name, imbalance):
    seen = []
    images = LabelledImages(ArrayImages(np.zeros((2, 4, 4, 3), np.uint8), "zeros"), [0, 1])

    def cifar(*args, **options):
        seen.append((args, options["train"]))
        return images

    monkeypatch.setattr("lpt_peft.cli.common.open_data.cifar_lt", cifar)
    assert set(open_splits(source, ImageSettings(), 0)) == {"train", "test"}
    assert seen == [(("/a", name, imbalance), True), (("/a", name, imbalance), False)]


def test_data_sets_of_hugging_face(data, run, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})

    def load(folder):
        files = sorted((data / folder).rglob("*.png"))
        labels = [NAMES.index(file.parent.name) for file in files]
        return datasets.Dataset.from_dict({"image": [str(f) for f in files], "label": labels}, features=features)

    train, test = load("train"), load("test")
    datasets.DatasetDict(train=train, validation=load("val"), test=test).save_to_disk(tmp_path / "saved")
    source = f"hf:{tmp_path / 'saved'}"
    assert main(["train", source, "--output", str(tmp_path / "run"), *BACKBONE, *SMALL]) == 0
    assert same_prompts(run, tmp_path / "run")
    capsys.readouterr()
    for words in (["evaluate", str(tmp_path / "run"), "--json"], ["evaluate", str(run), source, "--json"]):
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out) == json.loads((run / "results.json").read_text())
    train.save_to_disk(tmp_path / "train")
    assert counts(open_splits(f"hf:{tmp_path / 'train'}", ImageSettings(validation_share=0.25), 0)) == {
        "train": [15, 6, 3],
        "validation": [5, 2, 0],
    }
    unlabelled = test.map(lambda row: {"label": -1})
    datasets.DatasetDict(train=train, test=unlabelled).save_to_disk(tmp_path / "unlabelled")
    splits = open_splits(f"hf:{tmp_path / 'unlabelled'}", ImageSettings(val=data / "val"), 0)
    assert str(splits["train"].summary).count('the split for "test" is left out') == 1
    assert counts(splits) == {"train": [20, 8, 3], "validation": [4, 4, 0]}
    datasets.DatasetDict(test=test).save_to_disk(tmp_path / "test")
    with pytest.raises(InputError, match='has no split "train"; its splits are test'):
        open_splits(f"hf:{tmp_path / 'test'}", ImageSettings(), 0)
    with pytest.raises(InputError, match="nobody/nothing cannot be loaded"):
        open_splits("hf:nobody/nothing", ImageSettings(), 0)


@pytest.mark.parametrize("content", ["files", "other folder", "nothing"])
def test_splits_without_labels_are_left_out_once(data, tmp_path, capsys, content):
    shutil.copytree(data / "train", tmp_path / "train")
    shutil.copytree(data / "val", tmp_path / "val")
    (tmp_path / "test" / "images").mkdir(parents=True)
    if content == "nothing":
        (tmp_path / "test" / "images").rmdir()
    else:
        place = tmp_path / "test" / ("images" if content == "other folder" else "")
        shutil.copy(data / "test" / "ant" / "0.png", place)
    for open_all, names in (
        (open_splits, {"train", "validation"}),
        (partial(open_test_splits, class_names=NAMES), {"validation"}),
    ):
        assert set(open_all(str(tmp_path), ImageSettings(), 0)) == names
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"{tmp_path / 'test'} has no folder of a class" in err
    with pytest.raises(InputError):  # the user named it
        open_splits(str(tmp_path / "train"), ImageSettings(test=tmp_path / "test"), 0)


@pytest.mark.parametrize(
    ("output", "refused"),
    [
        ("classes/run", True),
        ("classes", True),
        ("classes/ant/run", True),
        ("link/run", True),
        ("classes/../classes/./run", True),
        ("run", False),
        ("classes-run", False),
        ("splits/run", False),
        ("splits/train/run", True),
        ("splits/test", True),
        ("splits", True),
        ("only/run", True),
        ("val/run", True),
    ],
)
def test_the_output_is_not_among_the_images(data, tmp_path, output, refused):
    shutil.copytree(data / "train", tmp_path / "classes")
    (tmp_path / "link").symlink_to(tmp_path / "classes")
    for folder in ("splits/train", "splits/val", "only/train", "val"):
        shutil.copytree(data / "train", tmp_path / folder)
    source = {"splits": "splits", "only": "only"}.get(output.split("/")[0], "classes")
    images = ImageSettings(val=tmp_path / "val")
    before = set(open_splits(str(tmp_path / source), images, 0)["train"].class_names)
    if refused:
        with pytest.raises(InputError, match="is in .*, which is read for images.*Choose a folder outside"):
            check_output(tmp_path / output, str(tmp_path / source), images)
        return
    check_output(tmp_path / output, str(tmp_path / source), images)
    for folder in ("checkpoints", "prompts"):
        (tmp_path / output / folder).mkdir(parents=True)
    assert set(open_splits(str(tmp_path / source), images, 0)["train"].class_names) == before


def test_a_refused_output_is_not_created(data, capsys):
    output = data / "train" / "run"
    assert main(["train", str(data / "train"), "--output", str(output), "--backbone", "no such model"]) == 1
    err = capsys.readouterr().err
    assert f"--output {data.parent / data.name / 'train-run'}" in err
    assert not output.exists()
