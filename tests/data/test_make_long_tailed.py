"""Property tests of make_long_tailed and of the class counts."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft.data.long_tail import exponential_counts, make_long_tailed, step_counts
from lpt_peft.errors import ConfigError, InputError

quick = settings(max_examples=80, deadline=None)
kinds = st.sampled_from(["exp", "step"])


ALMOST = Decimal("1e-9")  # tolerance for floating-point error


def share(kind, label, classes, imbalance):
    """Relative class size, with 28 digits."""
    tail = 1 / Decimal(imbalance)
    if kind == "exp":
        return tail ** (Decimal(label) / (classes - 1))
    return tail if label >= classes / 2 else Decimal(1)


def count(largest, part):
    return int(largest * part + ALMOST)


@st.composite
def label_lists(draw, balanced=False):
    sizes = draw(st.lists(st.integers(1, 30), min_size=2, max_size=6))
    if balanced:
        sizes = [max(sizes)] * len(sizes)
    return draw(st.permutations([label for label, size in enumerate(sizes) for _ in range(size)]))


@quick
@given(label_lists(), st.floats(1, 40), kinds, st.integers(0, 2**40))
def test_counts_are_the_largest_possible(labels, imbalance, kind, seed):
    classes = max(labels) + 1
    sizes = [labels.count(label) for label in range(classes)]
    try:
        kept = make_long_tailed(labels, imbalance, kind, seed=seed)
    except ConfigError:
        kept = []
    largest = 0  # brute force: increase it as long as every class has enough images
    shares = [share(kind, label, classes, imbalance) for label in range(classes)]
    while all(largest + 1 <= size / part + ALMOST for size, part in zip(sizes, shares, strict=True)):
        largest += 1
    counts = [count(largest, part) for part in shares]
    if min(counts) < 1:
        assert not kept
        return
    assert len(set(kept)) == len(kept)
    assert [labels[index] for index in kept] == [label for label in range(classes) for _ in range(counts[label])]
    assert make_long_tailed(np.array(labels), imbalance, kind, seed=seed) == kept


@quick
@given(label_lists(balanced=True), st.floats(1, 8), st.floats(1, 8), kinds, st.integers(0, 99))
def test_higher_imbalance_keeps_a_subset_on_balanced_data(labels, first, second, kind, seed):
    size = labels.count(0)
    low, high = sorted((first, second))
    if size / high < 1.01:
        return
    more, fewer = (make_long_tailed(labels, imbalance, kind, seed=seed) for imbalance in (low, high))
    assert set(fewer) <= set(more)
    assert sum(labels[index] == 0 for index in fewer) == size


def test_seeds_draw_different_images_without_the_global_generator():
    labels = [0, 1] * 50
    before = np.random.get_state()[1].copy()
    draws = [make_long_tailed(labels, 5, seed=seed) for seed in range(30)]
    assert np.array_equal(np.random.get_state()[1], before)
    assert len({tuple(draw) for draw in draws}) == 30
    assert {len(draw) for draw in draws} == {60}
    tail = np.bincount([index for draw in draws for index in draw if labels[index]], minlength=100)[1::2]
    assert tail.min() >= 1, "every image of the tail class is drawn by at least one seed"


@quick
@given(st.integers(2, 40), st.integers(1, 600), st.floats(1, 200))
def test_counts_fall_from_largest_to_largest_over_imbalance(classes, largest, imbalance):
    for kind, function in (("exp", exponential_counts), ("step", step_counts)):
        try:
            counts = function(classes, largest, imbalance)
        except ConfigError:
            assert int(largest / imbalance) <= 1
            continue
        assert counts == [count(largest, share(kind, label, classes, imbalance)) for label in range(classes)]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] == largest
        assert abs(counts[-1] - largest / imbalance) <= 1


@pytest.mark.parametrize("imbalance", [3, 7, 10, 49, 98, 100, 187])
@pytest.mark.parametrize("smallest", [1, 2, 9])
def test_floating_point_error_does_not_lower_a_count(imbalance, smallest):
    counts = exponential_counts(10, smallest * imbalance, imbalance)
    assert (counts[0], counts[-1]) == (smallest * imbalance, smallest)
    labels = [label for label in range(10) for _ in range(imbalance)]
    assert len(make_long_tailed(labels, imbalance)) >= imbalance + 9


def test_refusals():
    for labels in ([0, 0], [0, 2], [1, 2]):
        with pytest.raises(InputError, match="labels from 0 to C - 1"):
            make_long_tailed(labels, 10)
    with pytest.raises(InputError, match="labels are empty"):
        make_long_tailed([], 10)
    with pytest.raises(InputError, match="at least 0"):
        make_long_tailed([0, -1], 10)
    for imbalance in (0.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="imbalance >= 1"):
            make_long_tailed([0, 1], imbalance)
        with pytest.raises(ConfigError, match="imbalance >= 1"):
            step_counts(2, 9, imbalance)
    with pytest.raises(ConfigError, match="leaves class 1 no image"):
        make_long_tailed([0, 0, 1, 1], 3)
    with pytest.raises(ConfigError, match="kind='log'"):
        make_long_tailed([0, 1], 1, "log")
    with pytest.raises(ConfigError, match="seed=-1"):
        make_long_tailed([0, 1], 1, seed=-1)
    with pytest.raises(ConfigError, match="num_classes >= 2"):
        step_counts(1, 5, 2)
