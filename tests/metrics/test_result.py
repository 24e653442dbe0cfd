"""Metrics against brute force, torchmetrics and scikit-learn."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lpt_peft.metrics import ShotMetrics, shot_metrics
from tests.metrics.oracle import COUNTS, SIZE, assert_same, brute, brute_ece, draw, filled


@pytest.mark.parametrize("average", ["class", "image"])
@pytest.mark.parametrize("absent", [(), (0, 9), (7, 8, 9), (0, 1, 2, 3, 4, 5, 6, 7, 8)])
@pytest.mark.parametrize("name", ["lift", "oltr"])
def test_all_metrics_match_brute_force(average, absent, name):
    logits, target = draw(200, absent=absent)
    metrics = ShotMetrics.from_rule(name, COUNTS, average=average)
    for start in range(0, 200, 64):
        metrics(logits[start : start + 64], target[start : start + 64])
    is_many = (lambda n: n > 100) if name == "lift" else (lambda n: n >= 100)
    is_few = (lambda n: n < 20) if name == "lift" else (lambda n: n <= 20)
    expected = brute(logits.argmax(1).tolist(), target.tolist(), is_many, is_few, average)
    result = metrics.compute().to_dict()
    rule, error = result.pop("rule"), result.pop("expected_calibration_error")
    assert error == pytest.approx(brute_ece(logits.double().numpy(), target.numpy()), abs=1e-6)
    assert_same(result, expected)
    assert result["absent_classes"] == list(absent)
    assert rule.endswith("mean over classes" if average == "class" else "mean over images")


@pytest.mark.parametrize("absent", [(), (4, 9)])
def test_accuracies_match_torchmetrics_and_sklearn(absent):
    logits, target = draw(1000, absent=absent)
    result = filled(logits, target).compute()
    top1 = MulticlassAccuracy(SIZE, average="micro")(logits, target)
    assert result.accuracy == pytest.approx(float(top1), abs=1e-6)
    if not absent:  # torchmetrics counts classes that are predicted but absent as 0
        macro = MulticlassAccuracy(SIZE, average="macro")(logits, target)
        assert result.balanced_accuracy == pytest.approx(float(macro), abs=1e-6)
    each = MulticlassAccuracy(SIZE, average="none")(logits, target).tolist()
    assert [None if j in absent else pytest.approx(each[j], abs=1e-6) for j in range(SIZE)] == list(result.per_class)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns about classes that are predicted but absent
        balanced = balanced_accuracy_score(target.numpy(), logits.argmax(1).numpy())
    assert result.balanced_accuracy == pytest.approx(balanced, abs=1e-12)
    assert result.overall == result.balanced_accuracy
    assert filled(logits, target, average="image").compute().overall == result.accuracy


def test_geometric_and_harmonic_mean():
    result = shot_metrics([9, 1, 4], [10, 4, 4], [500, 50, 5])
    assert result.geometric_mean == pytest.approx((0.9 * 0.25 * 1.0) ** (1 / 3), abs=1e-12)
    assert result.harmonic_mean == pytest.approx(3 / (1 / 0.9 + 4 + 1), abs=1e-12)
    assert (result.worst_class, result.worst_accuracy) == (1, 0.25)


def test_geometric_and_harmonic_mean_with_an_accuracy_of_zero():
    result = shot_metrics([9, 0, 0], [10, 4, 3], [500, 50, 5])
    assert (result.geometric_mean, result.harmonic_mean, result.worst_class) == (0.0, 0.0, 1)  # the lowest index


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_calibration_error_matches_torchmetrics_and_brute_force(dtype):
    logits, target = draw(1000, dtype=dtype)
    error = filled(logits, target).compute().expected_calibration_error
    wide = logits if dtype == torch.float64 else logits.float()
    reference = float(MulticlassCalibrationError(SIZE, n_bins=15, norm="l1")(wide, target))
    assert error == pytest.approx(reference, abs=2e-6)
    assert error == pytest.approx(brute_ece(wide.double().numpy(), target.numpy()), abs=1e-6)
    assert error > 0.01


def test_calibration_error_of_saturated_softmax():
    logits = torch.tensor([[200.0, 0.0], [200.0, 0.0], [0.0, 200.0], [-200.0, 0.0]])  # all confidences are exactly 1
    metrics = ShotMetrics([5, 5])
    metrics.update(logits, torch.tensor([0, 1, 1, 1]))
    assert metrics.compute().expected_calibration_error == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 5])
def test_bins_are_closed_above(size, dtype):
    """1 / size is the edge between two bins; 0.1 % below it belongs to the same bin, so that errors may cancel."""
    edge = torch.zeros(1, size, dtype=dtype)
    lower, upper = 1 / size - 1 / 15, 1 / size
    rest = torch.full((1, 40), 0.0, dtype=dtype)
    wide = torch.cat([edge, rest - math.inf], dim=1)  # confidence exactly 1 / size among 40 masked classes
    inside = (lower + upper) / 2
    others = (1 - inside) / (size + 39)
    below = torch.full((1, size + 40), math.log(others), dtype=dtype)
    below[0, 0] = math.log(inside)  # confidence in the middle of the bin (lower, upper]
    metrics = ShotMetrics([1] * (size + 40))
    metrics.update(torch.cat([wide, below]), torch.tensor([0, 1]))  # correct, incorrect
    same_bin = abs(1 - upper - inside) / 2
    other_bin = (abs(1 - upper) + inside) / 2
    assert metrics.compute().expected_calibration_error == pytest.approx(same_bin, abs=1e-6)
    assert abs(same_bin - other_bin) > 0.1


def test_masked_classes_and_log_probabilities():
    logits, target = draw(50)
    result = filled(logits, target).compute()
    assert_same(filled(logits.log_softmax(1), target).compute().to_dict(), result.to_dict(), abs=1e-6)
    masked = torch.full((1, SIZE), -math.inf)
    masked[0, 3] = 0.0
    assert filled(masked, torch.tensor([3])).compute().expected_calibration_error == 0.0


def test_predicted_labels_give_no_calibration_error():
    logits, target = draw(100)
    scored, labelled = filled(logits, target), filled(logits.argmax(1), target)
    expected = scored.compute().to_dict()
    assert expected["expected_calibration_error"] is not None
    assert labelled.compute().to_dict() == {**expected, "expected_calibration_error": None}
    assert labelled.merge(scored).compute().expected_calibration_error is None  # some images have no confidence
    as_lists = filled(logits.argmax(1).tolist(), target.numpy())
    assert as_lists.compute() == filled(logits.argmax(1).int(), target.to(torch.uint8)).compute()


def test_absent_classes_are_listed_and_never_zero():
    result = filled(torch.tensor([0, 1]), torch.tensor([0, 1])).compute()
    assert result.absent_classes == tuple(range(2, SIZE))
    assert result.per_class == (1.0, 1.0) + (None,) * (SIZE - 2)
    assert (result.many, result.medium, result.few) == (1.0, None, None)
    assert (result.overall, result.geometric_mean, result.harmonic_mean, result.worst_class) == (1.0, 1.0, 1.0, 0)


def test_result_is_strict_json():
    for metrics in (ShotMetrics(COUNTS), filled(*draw(20, absent=(7, 8, 9)))):
        plain = metrics.compute().to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_no_images_give_none():
    for metrics in (ShotMetrics(COUNTS), filled(torch.empty(0, SIZE), torch.empty(0, dtype=torch.int64))):
        result = metrics.compute().to_dict()
        assert result.pop("rule")
        assert result.pop("num_images") == 0
        assert result.pop("absent_classes") == list(range(SIZE))
        assert result.pop("per_class") == [None] * SIZE
        assert set(result.values()) == {None}
