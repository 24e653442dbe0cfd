"""examples/digits_folder.py: the class folders contain the images of the demo."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from lpt_peft.data.digits import DigitsLT, digits_counts
from lpt_peft.data.folder import image_folder
from tests.test_examples import load_example


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits")
    load_example("digits_folder").write(path)
    return path


@pytest.mark.parametrize(("name", "split"), [("train", "train"), ("val", "validation"), ("test", "test")])
def test_folders_contain_the_splits_of_the_demo(folder, name, split):
    data = image_folder(folder / name, transform=lambda image: pil_to_tensor(image).float() / 255, verify="decode")
    demo = DigitsLT(split, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert data.class_names == [str(digit) for digit in range(10)]
    assert data.labels == demo.labels
    for (image, _), (original, _) in zip(data, demo, strict=True):
        assert image.shape == (3, 32, 32)
        assert torch.all((image - original).abs() <= 1 / 510 + 1e-6)


def test_training_counts_are_long_tailed(folder):
    found = Counter(path.parent.name for path in (folder / "train").rglob("*.png"))
    assert [found[str(digit)] for digit in range(10)] == [120, 76, 48, 30, 19, 12, 7, 4, 3, 2] == digits_counts()
    assert Counter(path.parent.name for path in (folder / "test").rglob("*.png")) == {str(d): 50 for d in range(10)}
