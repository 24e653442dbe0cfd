"""The long-tailed digits: counts, disjoint parts, a test part that no division touches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from sklearn.datasets import load_digits

from lpt_peft.data.digits import PAPER, DigitsLT, _split, digits_counts
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
def test_parts_are_disjoint_and_as_large_as_told(division):
    parts = {part: _split(DIGITS, part, division) for part in ("train", "validation", "test")}
    chosen = [index for part in parts.values() for index in part.tolist()]
    assert len(chosen) == len(set(chosen))
    assert Counter(DIGITS[parts["test"]].tolist()) == dict.fromkeys(range(10), 50)
    assert Counter(DIGITS[parts["train"]].tolist()) == dict(enumerate(digits_counts()))
    assert all(count >= 8 for count in Counter(DIGITS[parts["validation"]].tolist()).values())
    assert parts["test"].tolist() == _split(DIGITS, "test", 0).tolist()
    if division:
        assert parts["train"].tolist() != _split(DIGITS, "train", 0).tolist()


def test_images_are_dark_ink_on_light_paper():
    plain = DigitsLT("train", mean=(0.0,) * 3, std=(1.0,) * 3)
    image, label = plain[0]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert label == plain.labels[0] == 0
    assert float(image[:, 0, 0].mean()) == pytest.approx(PAPER, abs=0.02)
    assert image.min() < 0.2
    assert torch.equal(DigitsLT("train")[0][0], (image - 0.5) / 0.5)


def test_augmentation_is_torchs_own_and_changes_little():
    data = DigitsLT("train", augment=True)
    torch.manual_seed(3)
    one = data[5][0]
    torch.manual_seed(3)
    assert torch.equal(data[5][0], one)
    assert not torch.equal(data[5][0], one)


def test_unknown_part():
    with pytest.raises(ConfigError, match="part='val'"):
        DigitsLT("val")
