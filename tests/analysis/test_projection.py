"""Linear discriminant analysis against scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from lpt_peft.analysis import _inputs, linear_discriminant, two_sets
from lpt_peft.errors import ConfigError, InputError
from tests.analysis.oracle import clusters


def aligned(found, expected):
    """Found coordinates with the signs of the expected ones: directions have none."""
    return found * np.sign((found * expected).sum(0))


def test_unshrunk_directions_match_scikit_learn():
    features, labels = clusters(400, width=8, classes=5, dtype=torch.float64)
    plane = linear_discriminant(features, labels, components=3, shrinkage=0.0)
    reference = LinearDiscriminantAnalysis(solver="eigen", n_components=3).fit(features.numpy(), labels.numpy())
    expected = reference.transform(features.numpy())
    expected -= expected.mean(0)
    np.testing.assert_allclose(aligned(plane.project(features).numpy(), expected), expected, atol=1e-6)
    shares = plane.ratio / linear_discriminant(features, labels, components=4, shrinkage=0.0).ratio.sum()
    np.testing.assert_allclose(shares.numpy(), reference.explained_variance_ratio_, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.1, 0.7, 1.0])
def test_shrunk_direction_of_two_classes_matches_scikit_learn(alpha):
    features, labels = clusters(60, width=10, classes=2, dtype=torch.float64)
    direction = linear_discriminant(features, labels, components=1, shrinkage=alpha).directions[:, 0].numpy()
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=alpha).fit(features.numpy(), labels.numpy())
    expected = reference.coef_[0] / np.linalg.norm(reference.coef_[0])
    np.testing.assert_allclose(abs(direction @ expected) / np.linalg.norm(direction), 1, atol=1e-10)


@given(seed=st.integers(0, 30), alpha=st.floats(0.01, 1.0), chunk=st.sampled_from([1, 2**30]))
@settings(max_examples=15, deadline=None)
def test_shrunk_directions_match_scipys_generalized_problem(seed, alpha, chunk):
    features, labels = clusters(30, width=6, classes=4, seed=seed, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_inputs, "_CHUNK_BYTES", chunk)
        plane = linear_discriminant(features, labels, components=3, shrinkage=alpha)
    x, y = features.numpy(), labels.numpy()
    means = np.stack([x[y == label].mean(0) for label in range(4)])
    shares = np.array([(y == label).mean() for label in range(4)])
    within = (x - means[y]).T @ (x - means[y]) / len(x)
    between = (means - x.mean(0)).T @ np.diag(shares) @ (means - x.mean(0))
    shrunk = (1 - alpha) * within + alpha * np.trace(within) / 6 * np.eye(6)
    values, vectors = eigh(between, shrunk)
    np.testing.assert_allclose(plane.ratio.numpy(), values[::-1][:3], rtol=1e-6, atol=1e-9)
    directions = plane.directions.numpy()
    np.testing.assert_allclose(directions.T @ shrunk @ directions, np.eye(3), atol=1e-7)
    expected = x @ vectors[:, ::-1][:, :1]
    expected -= expected.mean()
    np.testing.assert_allclose(aligned(plane.project(features).numpy()[:, :1], expected), expected, atol=1e-5)


@pytest.mark.parametrize("rows", [10, 40, 2000])
def test_estimated_shrinkage_is_that_of_ledoit_and_wolf(rows):
    features, labels = clusters(rows, width=15, classes=3, dtype=torch.float64)
    means = torch.stack([features[labels == label].mean(0) for label in range(3)])
    _, expected = ledoit_wolf((features - means[labels]).numpy(), assume_centered=True)
    assert linear_discriminant(features, labels, components=1).shrinkage == pytest.approx(expected, rel=1e-6)


def test_more_dimensions_than_images_give_finite_directions():
    features, labels = clusters(10, width=50, classes=3)
    for alpha in (None, 0.0, 1.0):
        plane = linear_discriminant(features, labels, shrinkage=alpha)
        assert plane.directions.isfinite().all()


def test_labels_need_not_be_consecutive_and_signs_are_fixed():
    features, labels = clusters(100)
    plane = linear_discriminant(features, labels)
    assert torch.equal(plane.directions, linear_discriminant(features, 10 * labels + 3).directions)
    assert (plane.directions.gather(0, plane.directions.abs().argmax(0, keepdim=True)) > 0).all()


def test_two_sets_that_are_far_apart_are_separate_and_equal_sets_are_not():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 400, 50, generator=generator)
    assert two_sets(first, second + 3).separation == 1.0
    assert abs(two_sets(first, second).separation - 0.5) < 0.1
    assert two_sets(first, second + 3).first.shape == (200, 2)


def test_two_sets_show_images_that_did_not_fit_the_axis():
    # 40 images in 100 dimensions: a line separates any of them, but says nothing about others.
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 40, 100, generator=generator)
    assert two_sets(first, second, shrinkage=0.01).separation < 0.75


def test_axes_of_two_sets_are_uncorrelated_within_the_sets():
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(6, 6, generator=generator)
    first, second = torch.randn(2, 4000, 6, generator=generator) @ mix
    second = second + torch.randn(6, generator=generator)
    result = two_sets(first, second, shrinkage=0.0)
    for coordinates in (result.first, result.second):
        assert abs(torch.corrcoef(coordinates.T)[0, 1]) < 0.06  # 2,000 images: standard error 0.02


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: linear_discriminant(x, [0] * 6, components=1), InputError, "single class"),
        (lambda x: linear_discriminant(x, [0, 0, 0, 1, 1, 1], components=2), ConfigError, "components=2"),
        (lambda x: linear_discriminant(x, [0, 0, 0, 1, 1, 1], components=1, shrinkage=2), ConfigError, "shrinkage=2"),
        (lambda x: linear_discriminant(x, [0, 1], components=1), InputError, "2 labels for 6 rows"),
        (lambda x: linear_discriminant(x * 0, [0, 0, 0, 1, 1, 1], components=1), InputError, "nothing varies"),
        (lambda x: linear_discriminant(x, [0, 0, 0, 1, 1, 1], components=1).project(x[:, :2]), InputError, "features"),
        (lambda x: two_sets(x, x[:3]), InputError, "second has 3 rows"),
        (lambda x: two_sets(x, x[:, :2]), InputError, "second must be floating point"),
    ],
)
def test_errors_name_input_and_rule(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
