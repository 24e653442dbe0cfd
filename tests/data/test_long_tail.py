"""The accepted CIFAR-LT split (trap 13) against a brute force on numpy's global generator, from the description."""

from __future__ import annotations

import numpy as np
import pytest

from lpt_peft.data.long_tail import cifar_lt_indices, exponential_counts
from lpt_peft.errors import ConfigError, InputError


@pytest.mark.parametrize(("imbalance", "total", "smallest"), [(100, 10_847, 5), (50, 12_608, 10), (10, 19_573, 50)])
def test_cifar_100_lt_is_the_accepted_split(imbalance, total, smallest):
    labels = np.random.default_rng(7).permutation(np.repeat(np.arange(100), 500))
    before = np.random.get_state()[1].copy()
    ours = cifar_lt_indices(labels.tolist(), imbalance)
    assert np.array_equal(np.random.get_state()[1], before), "the global generator must not move"
    np.random.seed(0)
    wanted = []
    for label in range(100):
        indices = np.where(labels == label)[0]
        np.random.shuffle(indices)
        wanted.extend(indices[: int(500 * (1 / imbalance) ** (label / 99))])
    assert ours == wanted
    assert len(ours) == total
    assert np.bincount(labels[ours])[[0, -1]].tolist() == [500, smallest]


def test_refusals():
    with pytest.raises(InputError, match="not balanced"):
        cifar_lt_indices([0, 0, 1], 10)
    with pytest.raises(ConfigError, match="no image"):
        exponential_counts(10, 50, 100)
    with pytest.raises(ConfigError, match="imbalance >= 1"):
        exponential_counts(10, 50, float("nan"))
