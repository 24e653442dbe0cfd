"""Calibration against torchmetrics, loops and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torchmetrics.classification import MulticlassCalibrationError

from lpt_peft.analysis import _inputs, fit_temperature, reliability, reliability_by_shots
from lpt_peft.errors import InputError
from lpt_peft.metrics import ShotMetrics
from tests.metrics.oracle import COUNTS, SIZE, draw

SHOTS = {"many": range(3), "medium": range(3, 6), "few": range(6, SIZE)}  # of COUNTS, by the rule "lpt"


def confidence_and_correct(logits, target):
    confidence, predicted = logits.softmax(1).max(1)
    return confidence, predicted == target


@pytest.mark.parametrize("seed", [0, 1])
def test_error_of_each_shot_group_matches_torchmetrics(seed):
    logits, target = draw(1500, seed=seed)
    found = reliability_by_shots(*confidence_and_correct(logits, target), target, COUNTS)
    assert set(found) == {"overall", "many", "medium", "few"}
    for name, classes in {"overall": range(SIZE), **SHOTS}.items():
        own = torch.isin(target, torch.tensor(list(classes)))
        expected = float(MulticlassCalibrationError(SIZE, n_bins=15, norm="l1")(logits[own], target[own]))
        assert found[name].error == pytest.approx(expected, abs=2e-6)
        assert int(found[name].images.sum()) == int(own.sum())


def test_overall_error_is_that_of_shot_metrics():
    logits, target = draw(800)
    metrics = ShotMetrics(COUNTS)
    metrics.update(logits, target)
    assert reliability(*confidence_and_correct(logits, target)).error == metrics.compute().expected_calibration_error


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_curve_matches_loops(rows):
    found = reliability(torch.tensor([row[0] for row in rows]), [row[1] for row in rows])
    bins = [max(0, next(b for b in range(15) if np.float32(c) <= np.float32(b + 1) / np.float32(15))) for c, _ in rows]
    gap = 0.0
    for index in range(15):
        own = [row for row, b in zip(rows, bins, strict=True) if b == index]
        assert int(found.images[index]) == len(own)
        if not own:
            assert math.isnan(found.accuracy[index])
            continue
        accuracy, confidence = sum(hit for _, hit in own) / len(own), sum(c for c, _ in own) / len(own)
        assert float(found.accuracy[index]) == pytest.approx(accuracy)
        assert float(found.confidence[index]) == pytest.approx(confidence, abs=1e-8)
        gap += len(own) / len(rows) * abs(accuracy - confidence)
    assert found.error == pytest.approx(gap, abs=1e-7)


def test_shot_group_without_images_has_no_error():
    logits, target = draw(100, absent=tuple(SHOTS["few"]))
    found = reliability_by_shots(*confidence_and_correct(logits, target), target, COUNTS)
    assert found["few"].error is None
    assert found["few"].accuracy.isnan().all()


@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temperature_matches_scipy(scale, dtype):
    logits, target = draw(600, dtype=dtype)
    logits = logits * scale

    def loss(log_temperature):
        scaled = (logits.double() / math.exp(log_temperature)).log_softmax(1)
        return float(-scaled.gather(1, target[:, None]).mean())

    expected = minimize_scalar(loss, bounds=(math.log(0.01), math.log(100)), method="bounded", options={"xatol": 1e-9})
    found = fit_temperature(logits, target)
    assert math.log(found.value) == pytest.approx(expected.x, abs=1e-5)
    assert found.loss_after == pytest.approx(expected.fun, abs=1e-9)
    assert found.loss_before == pytest.approx(loss(0.0), abs=1e-6)


@given(st.floats(0.1, 10.0), st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_temperature_follows_the_scale_of_the_logits(scale, seed):
    logits, target = draw(300, seed=seed, dtype=torch.float64)
    found = fit_temperature(logits, target).value
    assert fit_temperature(scale * logits, target).value == pytest.approx(scale * found, rel=1e-6)


def test_temperature_of_sampled_classes_is_recovered():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40_000, 6, generator=generator)
    target = torch.multinomial((logits / 2.5).softmax(1), 1, generator=generator).squeeze(1)
    assert fit_temperature(logits, target).value == pytest.approx(2.5, rel=0.03)


def test_temperature_does_not_depend_on_chunks(monkeypatch):
    logits, target = draw(90)
    expected = fit_temperature(logits, target)
    monkeypatch.setattr(_inputs, "_CHUNK_BYTES", 1)
    assert fit_temperature(logits, target) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("logits", "target", "words"),
    [
        (torch.eye(3) * 9, [0, 1, 2], "correctly with such a margin"),
        (-torch.eye(3) * 9, [0, 1, 2], "no higher than the others"),
        (torch.ones(3, 3), [0, 1, 2], "all equal"),
        (torch.ones(3, 1), [0, 0, 0], "all equal"),
        (torch.eye(3) / 0, [0, 1, 2], "NaN or infinity"),
        (torch.eye(3)[:0], [], "empty"),
        (torch.eye(3), [0, 1, 3], "out of range"),
        (torch.eye(3), [0, 1], "2 labels for 3 rows"),
        (torch.ones(3), [0, 1, 2], "floating point"),
    ],
)
def test_degenerate_logits_have_no_temperature(logits, target, words):
    with pytest.raises(InputError, match=words):
        fit_temperature(logits, target)


@pytest.mark.parametrize(
    ("confidence", "correct", "words"),
    [
        (torch.tensor([1.5]), [True], "is not from 0 to 1"),
        (torch.tensor([math.nan]), [True], "is not from 0 to 1"),
        (torch.tensor([1]), [True], "floating point"),
        (torch.tensor([[0.5]]), [True], "floating point"),
        (torch.tensor([0.5]), [1], "correct must be booleans"),
        (torch.tensor([0.5]), [True, False], "correct must be booleans"),
    ],
)
def test_reliability_errors_name_input_and_rule(confidence, correct, words):
    with pytest.raises(InputError, match=words):
        reliability(confidence, correct)
