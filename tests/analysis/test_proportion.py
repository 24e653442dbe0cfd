"""Wilson's interval, against scipy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpt_peft.analysis import wilson_interval
from lpt_peft.errors import ConfigError, InputError


@given(
    counts=st.lists(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1),
    level=st.floats(0.5, 0.999),
)
def test_scipy_gives_the_same_bounds(counts, level):
    stats = pytest.importorskip("scipy.stats")
    low, high = wilson_interval([right for right, _ in counts], [images for _, images in counts], level=level)
    for (right, images), *bounds in zip(counts, low.tolist(), high.tolist(), strict=True):
        expected = stats.binomtest(right, images).proportion_ci(level, method="wilson")
        assert bounds == pytest.approx([expected.low, expected.high], abs=1e-12)
        assert 0 <= bounds[0] <= right / images <= bounds[1] <= 1


def test_a_class_without_images_has_no_interval():
    low, high = wilson_interval([0, 1], [0, 1])
    assert low.isnan().tolist() == high.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("counts", "level", "error", "message"),
    [
        (([1], [1]), 1.0, ConfigError, "level=1.0 must be above 0 and below 1"),
        (([2], [1]), 0.9, InputError, "correct exceeds total for class 0"),
        (([1, 1], [1]), 0.9, InputError, "one entry per class"),
    ],
)
def test_errors(counts, level, error, message):
    with pytest.raises(error, match=message):
        wilson_interval(*counts, level=level)
