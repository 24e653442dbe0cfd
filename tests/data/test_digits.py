"""The long-tailed digits: counts, disjoint splits, and the same test split in every division."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from sklearn.datasets import load_digits

from lpt_peft.data.digits import PAPER, DigitsLT, _split_indices, digits_counts
from lpt_peft.errors import ConfigError

DIGITS = load_digits().target


def test_counts():
    counts = digits_counts()
    assert counts[0] == 120
    assert counts[-1] == 2
    assert counts == sorted(counts, reverse=True)
    ratios = [later / earlier for earlier, later in zip(counts, counts[1:], strict=False)]
    assert all(0.5 <= ratio <= 0.76 for ratio in ratios), "exponential up to rounding"


@pytest.mark.parametrize("division", [0, 1, 7])
def test_splits_are_disjoint_and_have_the_documented_sizes(division):
    splits = {name: _split_indices(DIGITS, name, division) for name in ("train", "validation", "test")}
    indices = [index for split in splits.values() for index in split.tolist()]
    assert len(indices) == len(set(indices))
    assert Counter(DIGITS[splits["test"]].tolist()) == dict.fromkeys(range(10), 50)
    assert Counter(DIGITS[splits["train"]].tolist()) == dict(enumerate(digits_counts()))
    assert all(count >= 8 for count in Counter(DIGITS[splits["validation"]].tolist()).values())
    assert splits["test"].tolist() == _split_indices(DIGITS, "test", 0).tolist()
    if division:
        assert splits["train"].tolist() != _split_indices(DIGITS, "train", 0).tolist()


def test_images_are_dark_ink_on_light_paper():
    plain = DigitsLT("train", mean=(0.0,) * 3, std=(1.0,) * 3)
    image, label = plain[0]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert label == plain.labels[0] == 0
    assert float(image[:, 0, 0].mean()) == pytest.approx(PAPER, abs=0.02)
    assert image.min() < 0.2
    assert torch.equal(DigitsLT("train")[0][0], (image - 0.5) / 0.5)


def test_augmentation_draws_from_the_generator_of_torch():
    data = DigitsLT("train", augment=True)
    torch.manual_seed(3)
    image = data[5][0]
    torch.manual_seed(3)
    assert torch.equal(data[5][0], image)
    assert not torch.equal(data[5][0], image)


def test_unknown_split():
    with pytest.raises(ConfigError, match="split='val'"):
        DigitsLT("val")
