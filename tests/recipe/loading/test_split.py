"""split_validation against a brute-force count."""

from __future__ import annotations

import pytest

from lpt_peft.errors import ConfigError
from lpt_peft.recipe.loading.split import split_validation


def test_each_class_gives_its_share():
    labels = [0] * 10 + [1] * 4 + [2] * 3
    train, held_out = split_validation(labels, 0.25, seed=3)
    assert sorted(train + held_out) == list(range(17))
    assert [sum(labels[i] == label for i in held_out) for label in range(3)] == [2, 1, 0]
    assert split_validation(labels, 0.25, seed=3) == (train, held_out)
    assert any(split_validation(labels, 0.25, seed=seed)[1] != held_out for seed in range(5))
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        split_validation(labels, 1.0)
    with pytest.raises(ConfigError, match="less than one image"):
        split_validation(labels, 0.05)
