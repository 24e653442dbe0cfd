"""The standard CIFAR-LT subset (trap 13) against a brute force on the global generator of numpy."""

from __future__ import annotations

import numpy as np
import pytest

from lpt_peft.data.long_tail import cifar_lt_indices, exponential_counts
from lpt_peft.errors import ConfigError, InputError


@pytest.mark.parametrize(("imbalance", "total", "smallest"), [(100, 10_847, 5), (50, 12_608, 10), (10, 19_573, 50)])
def test_cifar_100_lt_is_the_standard_subset(imbalance, total, smallest):
    labels = np.random.default_rng(7).permutation(np.repeat(np.arange(100), 500))
    before = np.random.get_state()[1].copy()
    indices = cifar_lt_indices(labels.tolist(), imbalance)
    assert np.array_equal(np.random.get_state()[1], before), "the global generator must not change"
    np.random.seed(0)
    expected = []
    for label in range(100):
        rows = np.where(labels == label)[0]
        np.random.shuffle(rows)
        expected.extend(rows[: int(500 * (1 / imbalance) ** (label / 99))])
    assert indices == expected
    assert len(indices) == total
    assert np.bincount(labels[indices])[[0, -1]].tolist() == [500, smallest]


def test_refusals():
    with pytest.raises(InputError, match="not balanced"):
        cifar_lt_indices([0, 0, 1], 10)
    with pytest.raises(ConfigError, match="no image"):
        exponential_counts(10, 50, 100)
    with pytest.raises(ConfigError, match="imbalance >= 1"):
        exponential_counts(10, 50, float("nan"))
