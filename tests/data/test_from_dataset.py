"""Map-style datasets: torchvision, tensors and custom classes, with listed or given labels."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder

from lpt_peft import DualSampler
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.data.long_tail import make_long_tailed
from lpt_peft.errors import InputError
from tests.data.make import color, seen, write_png


def test_labels_and_names_of_a_torchvision_dataset(tmp_path):
    for index in range(4):
        write_png(tmp_path / ("cat" if index < 3 else "dog") / f"{index}.png", index)
    data = from_dataset(ImageFolder(str(tmp_path)))
    assert (data.labels, data.class_names, data.class_counts) == ([0, 0, 0, 1], ["cat", "dog"], [3, 1])
    assert [seen(image) for image, _ in data] == [color(index) for index in range(4)]


def test_tensors_and_transforms():
    images, targets = torch.rand(6, 3, 4, 4), torch.tensor([0, 0, 0, 1, 1, 1])
    data = from_dataset(TensorDataset(images, targets), targets, transform=lambda image: -image)
    assert torch.equal(data[4][0], -images[4])
    subset = data.subset(make_long_tailed(data.labels, 3))
    assert subset.class_counts == [3, 1]
    assert all(any(torch.equal(image, -row) for row in images) for image, _ in subset)
    assert len(list(DualSampler(subset.labels, 4))) == 3


class Custom:
    labels = (0, 1)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return Image.new("L", (2, 2), index), "more", "things"


def test_labels_attribute_and_given_names():
    data = from_dataset(Custom(), class_names=["x", "y"])
    assert (data.class_names, data[1][0].mode, data[1][0].getpixel((0, 0))) == (["x", "y"], "RGB", (1, 1, 1))


def test_refusals():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(InputError, match="Stream is not map-style"):
        from_dataset(Stream())
    with pytest.raises(InputError, match="FakeData has neither"):
        from_dataset(FakeData(3))
    with pytest.raises(InputError, match="2 labels do not match 3 images"):
        from_dataset(FakeData(3), [0, 1])


class Named(Custom):
    """A dataset with `classes` in the form of other libraries."""

    def __init__(self, classes):
        self.classes = classes


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ([("tench", "Tinca tinca"), ("goldfish",)], ["tench, Tinca tinca", "goldfish"]),  # torchvision's ImageNet
        ({"dog": 1, "cat": 0}, ["cat", "dog"]),
        ({1: "dog", 0: "cat"}, ["cat", "dog"]),
        ((7, 9), ["7", "9"]),
    ],
)
def test_classes_of_the_dataset(classes, names):
    assert from_dataset(Named(classes)).class_names == names


def test_class_names_in_any_order_and_invalid_class_names():
    assert from_dataset(Custom(), class_names={"dog": 1, "cat": 0}).class_names == ["cat", "dog"]
    assert from_dataset(Custom(), class_names={"1": "dog", "0": "cat"}).class_names == ["cat", "dog"]
    for class_names, words in (
        (["x", "x"], "class_names has 'x' for the classes 0 and 1"),
        ({"x", "y"}, "class_names is a set"),
        ((name for name in "xy"), "class_names is a generator"),
        ("xy", "class_names must be one string per class"),
        (["x", 1], r"class_names\[1\]=1 must be a string"),
    ):
        with pytest.raises(InputError, match=words):
            from_dataset(Custom(), class_names=class_names)
