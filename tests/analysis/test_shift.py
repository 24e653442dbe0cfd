"""Shifted test sets: matching of classes, accuracy kept, synthetic shifts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from lpt_peft.analysis import accuracy_shift, add_noise, blur, match_classes
from lpt_peft.errors import ConfigError, InputError

COUNTS = st.integers(0, 5).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_case_spaces_and_unicode_forms_do_not_count():
    found = match_classes(["Guinea\u00a0Pig", "cafe\u0301", "zebra"], ["caf\u00e9", "guinea pig", "dog"])
    assert found == ((1, 0, None), ("zebra",), ("dog",))


def test_classes_that_differ_in_case_alone_match_exactly():
    assert match_classes(["A", "b"], ["a", "A", "b"]) == ((1, 2), (), ("a",))


@pytest.mark.parametrize(
    ("names", "model_names", "words"),
    [
        (["x", "y"], ["a", "b"], "None of the classes"),
        (["a", "a"], ["a", "b"], "names has a name twice"),
        (["a"], ["a", "b", "b"], "model_names has a name twice"),
    ],
)
def test_names_that_cannot_be_matched(names, model_names, words):
    with pytest.raises(InputError, match=words):
        match_classes(names, model_names)


@given(st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_accuracies_match_loops(rows):
    before, after = [row[0] for row in rows], [row[1] for row in rows]
    found = accuracy_shift([n for n, _ in before], [n for _, n in before], [n for n, _ in after], [n for _, n in after])
    shared = [(b, a) for b, a in rows if b[1] and a[1]]
    assert (found.classes, found.images) == (len(shared), sum(a[1] for _, a in shared))
    if not shared:
        assert found[2:] == (None,) * 4
        return
    original = sum(b[0] / b[1] for b, _ in shared) / len(shared)
    shifted = sum(a[0] / a[1] for _, a in shared) / len(shared)
    assert found[2:5] == pytest.approx((original, shifted, original - shifted))
    assert found.kept == (pytest.approx(shifted / original) if original else None)


def test_counts_of_different_lengths():
    with pytest.raises(InputError, match="correct has 1 classes and shifted_correct 2"):
        accuracy_shift([1], [1], [1, 1], [1, 1])


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5])
def test_blur_matches_scipy(sigma):
    images = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    radius = int(np.ceil(3 * sigma))
    expected = gaussian_filter(images.double().numpy(), (0, 0, sigma, sigma), mode="nearest", radius=radius)
    np.testing.assert_allclose(blur(images, sigma).numpy(), expected, atol=1e-6)


def test_blur_of_nothing_and_of_a_constant():
    images = torch.full((1, 3, 8, 8), 0.25)
    assert torch.equal(blur(images, 0), images)
    torch.testing.assert_close(blur(images, 2.0), images)


def test_noise_has_its_standard_deviation_and_stays_in_range():
    images = torch.full((4, 3, 64, 64), 0.5)
    noisy = add_noise(images, 0.1, torch.Generator().manual_seed(0))
    assert float((noisy - images).std()) == pytest.approx(0.1, rel=0.02)
    strong = add_noise(images, 2.0, torch.Generator().manual_seed(0))
    assert (float(strong.min()), float(strong.max())) == (0.0, 1.0)
    assert torch.equal(noisy, add_noise(images, 0.1, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: blur(torch.zeros(1, 3, 4, 4), -1), ConfigError, "sigma=-1"),
        (lambda: blur(torch.zeros(3, 4, 4), 1), InputError, "images must be"),
        (lambda: add_noise(torch.zeros(1, 3, 4, 4), "a", torch.Generator()), ConfigError, "std='a'"),
        (lambda: add_noise(torch.zeros(1, 3, 4, 4).long(), 1, torch.Generator()), InputError, "images must be"),
    ],
)
def test_errors_name_input_and_rule(call, error, words):
    with pytest.raises(error, match=words):
        call()
