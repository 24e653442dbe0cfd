"""Evaluation with several crops and with post-hoc logit adjustment, against formulas written by hand."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.utils.data import TensorDataset

from lpt_peft.errors import ConfigError, InputError
from lpt_peft.metrics import ShotMetrics
from lpt_peft.recipe import PredictionRecorder, evaluate, train
from tests.recipe.tiny import COUNTS, SHORT, noisy_validation, striped_data, tiny_adapter

RULE = "many: n > 100, medium: 20 < n <= 100, few: n <= 20; mean over classes"


@functools.cache
def trained_adapter():
    """An adapter that classifies some of the noisy images correctly."""
    adapter = tiny_adapter()
    dataset, labels = striped_data()
    with torch.enable_grad():
        train(adapter, dataset, labels, SHORT, progress=False)
    return adapter


def views(number=5):
    """Images (N, number, 3, 32, 32), shifted copies that stand for crops, and labels."""
    images, labels = noisy_validation().tensors
    return torch.stack([images.roll(3 * shift, dims=-1) for shift in range(number)], dim=1), labels


def measured(dataset, **options):
    recorder = PredictionRecorder()
    metrics = ShotMetrics.from_rule("lpt", COUNTS)
    result = evaluate(trained_adapter(), dataset, metrics, batch_size=8, num_workers=0, recorder=recorder, **options)
    return result, recorder.result


@torch.no_grad()
def test_the_logits_of_several_crops_are_the_mean_of_log_p():
    images, labels = views()
    adapter = trained_adapter()
    log_p = sum(torch.log(adapter(images[:, crop]).softmax(1)) for crop in range(5)) / 5
    result, found = measured(TensorDataset(images, labels), crops=5)
    assert torch.equal(found.prediction, log_p.argmax(1))
    torch.testing.assert_close(found.probability, log_p.softmax(1).amax(1), atol=1e-5, rtol=0)
    assert torch.equal(found.groups, adapter(images[:, 0], return_output=True).groups)
    assert result.accuracy == pytest.approx((log_p.argmax(1) == labels).double().mean().item())
    assert result.rule == f"{RULE}; mean of log p over 5 crops"
    single, _ = measured(TensorDataset(images[:, 0], labels))
    assert single.rule == RULE
    assert single.per_class != result.per_class, "the shifted images are classified differently"


@torch.no_grad()
@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_post_hoc_adjustment_subtracts_tau_times_the_log_share(tau):
    dataset = noisy_validation()
    shares = torch.tensor([count / sum(COUNTS) for count in COUNTS])
    images, labels = dataset.tensors
    adjusted = trained_adapter()(images) - tau * shares.log()
    result, found = measured(dataset, post_hoc_tau=tau)
    assert torch.equal(found.prediction, adjusted.argmax(1))
    torch.testing.assert_close(found.probability, adjusted.softmax(1).amax(1), atol=1e-5, rtol=0)
    assert result.accuracy == pytest.approx((adjusted.argmax(1) == labels).double().mean().item())
    assert result.rule == f"{RULE}; post-hoc logit adjustment, tau {tau:g}"


@torch.no_grad()
def test_crops_are_averaged_before_the_adjustment():
    images, labels = views()
    adapter = trained_adapter()
    log_p = sum(adapter(images[:, crop]).log_softmax(1) for crop in range(5)) / 5
    adjusted = log_p - 2 * torch.tensor([math.log(count / sum(COUNTS)) for count in COUNTS])
    result, found = measured(TensorDataset(images, labels), crops=5, post_hoc_tau=2.0)
    assert torch.equal(found.prediction, adjusted.argmax(1))
    assert result.rule.endswith("; mean of log p over 5 crops; post-hoc logit adjustment, tau 2")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"crops": 5},
            InputError,
            r"crops=5 needs images of shape \(5, C, H, W\), not \(3, 32, 32\)",
        ),
        ({"crops": 0}, ConfigError, "crops=0 must be an integer of at least 1"),
        ({"post_hoc_tau": -1.0}, ConfigError, "tau=-1.0 must be a finite number of at least 0"),
        ({"post_hoc_tau": math.nan}, ConfigError, "tau=nan must be a finite number"),
    ],
)
def test_refusals(options, error, words):
    with pytest.raises(error, match=words):
        measured(striped_data()[0], **options)


def test_a_class_without_a_training_image_cannot_be_adjusted():
    metrics = ShotMetrics.from_rule("lpt", [20, 8, 0])
    with pytest.raises(InputError, match=r"class_counts\[2\]=0 must be an integer of at least 1"):
        evaluate(trained_adapter(), striped_data()[0], metrics, num_workers=0, post_hoc_tau=1.0)
