"""Hugging Face `datasets` objects, created in memory."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from lpt_peft.data._split_choice import choose_splits
from lpt_peft.data.huggingface import from_huggingface, open_huggingface, parse_source
from lpt_peft.errors import ConfigError, InputError, MissingExtraError, UnlabelledError
from tests.data.make import color, seen, write_png

datasets = pytest.importorskip("datasets")


def png(index):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), color(index)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def hub_dataset(labels=(1, 0, 1), names=("cat", "dog"), images=None, **more):
    features = {"id": datasets.Value("int64"), "img": datasets.Image(), "fine": datasets.ClassLabel(names=list(names))}
    size = len(labels)
    rows = {"id": list(range(size)), "img": images or [png(index) for index in range(size)], "fine": list(labels)}
    features |= {key: feature for key, (feature, _) in more.items()}
    rows |= {key: values for key, (_, values) in more.items()}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_columns_are_found_by_their_features():
    data = from_huggingface(hub_dataset(), transform=seen, verify="decode")
    assert (data.labels, data.class_names, data.class_counts) == ([1, 0, 1], ["cat", "dog"], [1, 2])
    assert list(data) == [(color(0), 1), (color(1), 0), (color(2), 1)]
    assert all(type(label) is int for label in data.labels)


def test_format_and_transform_are_ignored_and_the_order_is_kept():
    table = hub_dataset().select([2, 1, 0])
    for changed in (table.with_format("torch"), table.with_transform(lambda rows: {"img": [0] * len(rows["img"])})):
        data = from_huggingface(changed, transform=seen)
        assert list(data) == [(color(2), 1), (color(1), 0), (color(0), 1)]


def test_columns_by_name():
    numbers = (datasets.Value("int64"), [2, 0, 1])
    words = (datasets.Value("string"), ["b", "a", "b"])
    coarse = (datasets.ClassLabel(names=["animal", "thing"]), [0, 1, 0])
    table = hub_dataset(coarse=coarse, number=numbers, word=words)
    with pytest.raises(
        InputError,
        match=r"2 columns have the feature ClassLabel: 'fine' \(2 classes\), 'coarse' \(2 classes\)\. "
        r".* label_column=.*hf:NAME,label=",
    ):
        from_huggingface(table)
    assert from_huggingface(table, label_column="coarse").class_names == ["animal", "thing"]
    data = from_huggingface(table, "img", "number")
    assert (data.labels, data.class_names) == ([2, 0, 1], ["0", "1", "2"])
    data = from_huggingface(table, label_column="word")
    assert (data.labels, data.class_names) == ([1, 0, 1], ["a", "b"])
    data = from_huggingface(table, label_column="word", class_names=["b", "c", "a"], allow_empty=True)
    assert (data.labels, data.class_names) == ([0, 2, 0], ["b", "c", "a"])
    with pytest.raises(InputError, match=r"missing in class_names: \['a'\]"):
        from_huggingface(table, label_column="word", class_names=["b", "c"], allow_empty=True)
    with pytest.raises(InputError, match=r"names other classes than the training split.*\['cat', 'dog'\] and \['dog'"):
        from_huggingface(table, label_column="fine", class_names=["dog", "cat"])
    with pytest.raises(InputError, match="image_column='image' is not a column"):
        from_huggingface(table, image_column="image", label_column="coarse")
    with pytest.raises(InputError, match=r"No column has the feature Image; .*image_column="):
        from_huggingface(table.remove_columns("img"), label_column="coarse")
    masked = table.add_column("mask", [png(0)] * 3).cast_column("mask", datasets.Image())
    with pytest.raises(InputError, match="2 columns have the feature Image: 'img', 'mask'"):
        from_huggingface(masked, label_column="coarse")
    assert seen(from_huggingface(masked, "mask", "coarse")[1][0]) == color(0)


def test_several_labels_per_image():
    several = (datasets.Sequence(datasets.ClassLabel(names=["a", "b"])), [[0], [0, 1], []])
    with pytest.raises(InputError, match="has several labels per image"):
        from_huggingface(hub_dataset(objects=several), label_column="objects")


def test_images_that_are_not_decoded(tmp_path):
    """`Image(decode=False)`, encoded bytes and paths give the same pixels as decoded images."""
    table = hub_dataset()
    paths = []
    for index in range(3):
        write_png(tmp_path / f"{index}.png", index)
        paths.append(str(tmp_path / f"{index}.png"))
    raw = (datasets.Value("binary"), [png(index)["bytes"] for index in range(3)])
    table = hub_dataset(raw=raw, file=(datasets.Value("string"), paths))
    local = hub_dataset(images=[{"bytes": None, "path": path} for path in paths])
    for data in (
        from_huggingface(table.cast_column("img", datasets.Image(decode=False))),
        from_huggingface(table, image_column="raw"),
        from_huggingface(table, image_column="file"),
        from_huggingface(local),
        from_huggingface(local.cast_column("img", datasets.Image(decode=False))),
    ):
        assert [seen(image) for image, _ in data] == [color(index) for index in range(3)]


@pytest.mark.parametrize("decode", [True, False])
def test_orientation_follows_the_setting(decode):
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(stream, "PNG", exif=exif)
    image = {"bytes": stream.getvalue(), "path": None}
    table = hub_dataset(images=[image] * 3).cast_column("img", datasets.Image(decode=decode))
    assert from_huggingface(table)[0][0].size == (2, 4)
    assert from_huggingface(table, exif=False)[0][0].size == (4, 2)


def test_the_mode_of_the_feature_is_kept():
    table = hub_dataset().cast_column("img", datasets.Image(mode="L"))
    grey = from_huggingface(table)[2][0].getpixel((0, 0))
    assert len(set(grey)) == 1


def test_objects_that_are_not_a_single_split():
    with pytest.raises(InputError, match=r"dictionary of splits, \['test', 'train'\]"):
        from_huggingface(datasets.DatasetDict(train=hub_dataset(), test=hub_dataset()))
    with pytest.raises(InputError, match="streaming=False"):
        from_huggingface(hub_dataset().to_iterable_dataset())
    with pytest.raises(InputError, match="ndarray is not a map-style"):
        from_huggingface(np.zeros(3))


def test_missing_labels_and_images(caplog):
    with pytest.raises(InputError, match=r"labels\[1\] is -1"):
        from_huggingface(hub_dataset(labels=(0, -1, 1)))
    with pytest.raises(InputError, match="no label for 1 of 3 images"):
        from_huggingface(hub_dataset(labels=(0, None, 1)))
    for labels in ((-1, -1, -1), (None, None, -1)):
        with pytest.raises(UnlabelledError, match="all values are -1 or missing"):
            from_huggingface(hub_dataset(labels=labels))
    with pytest.raises(InputError, match=r"1 of 3 classes have no image; the first is label 2 \('c'\)"):
        from_huggingface(hub_dataset(names=("a", "b", "c")))
    images = [png(0), {"bytes": b"no image", "path": None}, None, png(3)]
    table = hub_dataset(labels=(0, 1, 1, 1), images=images)
    data = from_huggingface(table)
    with pytest.raises(InputError, match=r"image 1 of column 'img' \(index 1\) cannot be read: UnidentifiedImageError"):
        data[1]
    with pytest.raises(InputError, match="there is no image in this row"):
        data[2]
    skipping = from_huggingface(table, unreadable="skip", verify="decode", transform=seen)
    assert "2 of 4 images" in caplog.text
    assert [skipping[index][0] for index in range(4)] == [color(0), color(3), color(3), color(3)]


@pytest.fixture
def saved(tmp_path):
    """A data set on disk with four splits and two columns of class labels; the labels of "test" are hidden."""

    def split(fine, start=0):
        coarse = (datasets.ClassLabel(names=["animal", "thing"]), [(index + 1) % 2 for index in range(len(fine))])
        return hub_dataset(fine, images=[png(start + index) for index in range(len(fine))], coarse=coarse)

    splits = {"train": split((0, 1, 0)), "extra": split((1, 1, 0), 10), "dev": split((1,), 20), "test": split((-1, -1))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_open_huggingface(saved):
    splits = open_huggingface(f"hf:{saved},label=fine", unreadable="skip")
    assert list(splits) == ["train", "validation"]
    assert splits["train"].class_names == splits["validation"].class_names == ["cat", "dog"]
    assert (splits["train"].labels, splits["validation"].labels) == ([0, 1, 0], [1])
    assert seen(splits["validation"][0][0]) == color(20)
    assert "note: the split for \"test\" is left out: column 'fine' has no label" in str(splits["train"].summary)
    by_word = open_huggingface(f"{saved},train=extra,validation=train,test=dev,image=img,label=coarse")
    by_argument = open_huggingface(
        saved, train="extra", validation="train", test="dev", image_column="img", label_column="coarse"
    )
    for splits in (by_word, by_argument):
        assert {name: seen(split[0][0]) for name, split in splits.items()} == {
            "train": color(10),
            "validation": color(0),
            "test": color(20),
        }
        assert splits["test"].class_names == ["animal", "thing"]


def summaries(splits):
    return {name: list(split.summary.notes) for name, split in splits.items()}


def test_images_in_several_splits_are_noted(saved):
    notes = summaries(open_huggingface(f"{saved},label=fine,validation=train"))
    assert "3 images are also training images: the splits are train and train" in notes["validation"]
    assert any("splits that are not used: dev, extra" in note for note in notes["train"])
    splits = open_huggingface(f"{saved},label=fine,train=extra,validation=dev,test=dev")
    assert "1 images are also images of validation: the splits are dev and dev" in summaries(splits)["test"]
    assert not summaries(splits)["validation"]
    splits = open_huggingface(f"{saved},label=coarse,train=test")
    assert list(splits) == ["train", "validation"]
    assert 'the split "test" is not used for test: it has images of the training split' in summaries(splits)["train"]


@pytest.mark.parametrize(
    ("train", "validation", "count"),
    [
        ("train[:80%]", "train[80%:]", 0),
        ("train[:80%]", "train[50%:]", 30),
        ("train", "train[-10:]", 10),
        ("train[10:20]+valid", "valid[:3]+train[15:]", 8),
        ("train[:10]", "valid", 0),
    ],
)
def test_slices_that_overlap(train, validation, count):
    """Compared with the rows that `datasets` itself selects."""
    sizes = {"train": 100, "valid": 20}
    found, notes = choose_splits({"train": train, "validation": validation}, {}, sizes)
    assert found == {"train": train, "validation": validation}
    rows = []
    for expression in (train, validation):
        parts = datasets.ReadInstruction.from_spec(expression).to_absolute(sizes)
        rows.append({(part.splitname, row) for part in parts for row in range(part.from_, part.to)})
    assert len(rows[0] & rows[1]) == count
    assert [note.split()[0] for _, note in notes] == ([str(count)] if count else [])


def test_other_names_of_splits(tmp_path):
    table = hub_dataset()
    datasets.DatasetDict(Training=table, eval=table, testing=table).save_to_disk(tmp_path / "names")
    assert list(open_huggingface(str(tmp_path / "names"))) == ["train", "validation", "test"]


@pytest.mark.parametrize("setting", ["config=x", "revision=v2"])
def test_settings_of_the_hub_are_refused_for_a_folder(saved, setting):
    with pytest.raises(ConfigError, match="is a folder of save_to_disk, without config= and revision="):
        open_huggingface(f"hf:{saved},label=fine,{setting}")


def test_errors_end_in_a_single_period(monkeypatch):
    def load_dataset(*args, **options):
        raise FileNotFoundError("Couldn't find any data file at /x.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"any data file at /x\.$"):
        open_huggingface("user/name")


def test_open_huggingface_single_split(saved, tmp_path):
    hub_dataset().save_to_disk(tmp_path / "single")
    [(name, data)] = open_huggingface(str(tmp_path / "single")).items()
    assert (name, data.labels) == ("train", [1, 0, 1])


def test_open_huggingface_errors(saved, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="'fine' \\(2 classes\\), 'coarse' \\(2 classes\\)"):
        open_huggingface(saved)
    with pytest.raises(InputError, match="has no split 'training'; its splits are train, extra, dev, test"):
        open_huggingface(f"{saved},train=training")
    datasets.DatasetDict(a=hub_dataset(), test=hub_dataset()).save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match='has no split "train"; its splits are a, test. Choose: hf:NAME,train=SPLIT'):
        open_huggingface(str(tmp_path / "other"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    with pytest.raises(InputError, match="broken cannot be loaded: "):
        open_huggingface(str(tmp_path / "broken"))
    other = datasets.DatasetDict(train=hub_dataset(), test=hub_dataset(names=("dog", "cat")))
    other.save_to_disk(tmp_path / "names")
    with pytest.raises(InputError, match="names other classes than the training split"):
        open_huggingface(str(tmp_path / "names"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"lpt_peft\[hf\]"):
        open_huggingface(saved)


def test_configurations_and_slices_of_the_hub(monkeypatch):
    """The arguments that reach `datasets.load_dataset`, and the advice where a configuration is missing."""
    calls = []

    def load_dataset(name, config, *, revision=None, split=None):
        if config is None:
            raise ValueError("Config name is missing. Please pick one among the available configs: ['x', 'y']")
        calls.append((name, config, revision, split))
        table = hub_dataset()
        return datasets.DatasetDict(train=table, valid=table) if split is None else table.select([1, 2])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = open_huggingface("hf:user/name,config=x,revision=v2,train=train[1:],test=train[:1]+valid[1:]")
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "validation": 3, "test": 2}
    assert calls == [
        ("user/name", "x", "v2", None),
        ("user/name", "x", "v2", "train[1:]"),
        ("user/name", "x", "v2", "train[:1]+valid[1:]"),
    ]
    with pytest.raises(InputError, match=r"available configs: \['x', 'y'\].* Choose a configuration: hf:NAME,config="):
        open_huggingface("user/name")


def test_parse_source():
    assert parse_source("hf:a/b") == ("a/b", {})
    assert parse_source("hf: a/b , label=x,  config=y") == ("a/b", {"label": "x", "config": "y"})
    assert parse_source("a,b/c,label=x") == ("a,b/c", {"label": "x"})
    for source in ("a,lable=x", "a,label=", "a,label=x,label=y", "hf:,label=x", "hf:"):
        with pytest.raises(ConfigError, match="hf:NAME"):
            parse_source(source)
