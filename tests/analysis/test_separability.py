"""Distances within and between classes against all pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft.analysis import _inputs, separability
from lpt_peft.errors import ConfigError, InputError
from tests.analysis.oracle import clusters


def brute(features, labels, num_classes, distance):
    """Mean distances by loops over pairs of images."""
    rows = features.double()

    def d(a, b):
        return float(1 - a @ b / a.norm() / b.norm() if distance == "cosine" else (a - b).square().sum())

    members = [rows[labels == label] for label in range(num_classes)]
    intra = [
        sum(d(a, b) for i, a in enumerate(own) for j, b in enumerate(own) if i != j) / (len(own) * (len(own) - 1))
        for own in members
        if len(own) > 1
    ]
    present = [own for own in members if len(own)]
    inter = [
        sum(d(a, b) for a in first for b in second) / (len(first) * len(second))
        for i, first in enumerate(present)
        for second in present[i + 1 :]
    ]
    return intra, inter


@pytest.mark.parametrize("distance", ["cosine", "squared"])
@given(seed=st.integers(0, 50), rows=st.integers(6, 25), offset=st.sampled_from([0.0, 100.0]))
@settings(max_examples=12, deadline=None)
def test_closed_forms_match_all_pairs(distance, seed, rows, offset):
    features, labels = clusters(rows, width=4, classes=4, seed=seed, dtype=torch.float64)
    features = features + offset  # far from the origin, where squares cancel
    labels = labels * 2  # classes 1, 3 and 5 have no images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_inputs, "_CHUNK_BYTES", 300)
        result = separability(features, labels, 7, distance=distance)
    intra, inter = brute(features, labels, 7, distance)
    assert result.inter == pytest.approx(sum(inter) / len(inter), rel=1e-8)
    several = result.intra_per_class[~result.intra_per_class.isnan()].tolist()
    assert several == pytest.approx(intra, rel=1e-6)
    assert result.intra == pytest.approx(sum(intra) / len(intra), rel=1e-6)
    assert result.gamma == pytest.approx(result.intra / result.inter)


def test_float32_features_lose_nothing_to_rounding():
    features, labels = clusters(400, seed=3)
    exact = separability(features.double(), labels, 5)
    assert separability(features, labels, 5)[:3] == pytest.approx(exact[:3], rel=1e-5)


@given(scale=st.floats(0.01, 100.0))
@settings(max_examples=10, deadline=None)
def test_scale_changes_neither_cosines_nor_gamma(scale):
    features, labels = clusters(60, seed=1, dtype=torch.float64)
    for distance in ("cosine", "squared"):
        gamma = separability(features, labels, 5, distance=distance).gamma
        assert separability(scale * features, labels, 5, distance=distance).gamma == pytest.approx(gamma, rel=1e-7)


def test_means_over_nothing_give_none():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    single = separability(features, [0, 0, 0], 3)
    assert (single.inter, single.gamma) == (None, None)
    assert single.intra == pytest.approx(2 / 3)  # pairs of cosine 0, 0 and 1
    different = separability(features, [0, 1, 2], 3)
    assert (different.intra, different.gamma) == (None, None)
    assert all(math.isnan(value) for value in different.intra_per_class.tolist())
    equal = separability(torch.ones(4, 2), [0, 0, 1, 1], 2)
    assert (equal.intra, equal.inter, equal.gamma) == (0.0, pytest.approx(0, abs=1e-12), None) or equal.gamma >= 0


def test_equal_images_of_all_classes_have_no_ratio():
    equal = separability(torch.tensor([[2.0, 0.0]] * 4), [0, 0, 1, 1], 2)
    assert equal[:3] == (0.0, 0.0, None)


@pytest.mark.parametrize(
    ("features", "labels", "options", "error", "words"),
    [
        (torch.ones(2, 2), [0, 1], {"distance": "euclidean"}, ConfigError, '"cosine" or "squared"'),
        (torch.ones(2, 2), [0, 2], {}, InputError, "out of range"),
        (torch.ones(2, 2), [0], {}, InputError, "1 labels for 2 rows"),
        (torch.tensor([[1.0, 1.0], [0.0, 0.0]]), [0, 1], {}, InputError, "row of zeros"),
        (torch.tensor([[1.0, math.inf]]), [0], {}, InputError, "NaN or infinity"),
        (torch.ones(2, 2, dtype=torch.int64), [0, 1], {}, InputError, "floating point"),
    ],
)
def test_errors_name_input_and_rule(features, labels, options, error, words):
    with pytest.raises(error, match=words):
        separability(features, labels, 2, **options)
