"""Hugging Face `datasets` objects, created in memory."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lpt_peft.data.huggingface import from_huggingface
from lpt_peft.errors import InputError
from tests.data.make import color, seen

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
    with pytest.raises(InputError, match=r"2 columns have the feature ClassLabel, .* label_column="):
        from_huggingface(table)
    assert from_huggingface(table, label_column="coarse").class_names == ["animal", "thing"]
    data = from_huggingface(table, "img", "number")
    assert (data.labels, data.class_names) == ([2, 0, 1], ["0", "1", "2"])
    with pytest.raises(InputError, match="class_encode_column"):
        from_huggingface(table, label_column="word")
    with pytest.raises(InputError, match="image_column='image' is not a column"):
        from_huggingface(table, image_column="image", label_column="coarse")
    with pytest.raises(InputError, match="0 columns have the feature Image"):
        from_huggingface(table.remove_columns("img"), label_column="coarse")


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
    with pytest.raises(InputError, match="an integer for every image"):
        from_huggingface(hub_dataset(labels=(0, None, 1)))
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
