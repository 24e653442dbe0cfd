"""Bootstrap intervals against resampled images, exact distributions and simulated coverage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpt_peft.analysis import bootstrap, bootstrap_accuracy, bootstrap_difference
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.metrics import shot_metrics
from lpt_peft.metrics.result import SHOTS

COUNTS = [500, 200, 50, 30, 5, 2]  # two classes of each shot group
SIZES = [40, 30, 24, 32, 27, 21]  # test images


def target():
    return torch.repeat_interleave(torch.arange(6), torch.tensor(SIZES))


def predictions(models=1, seed=0, rate=0.6):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(models, sum(SIZES), generator=generator) < rate


def resampled_images(scores, draws=4000):
    """Balanced, many-, medium- and few-shot means of images drawn with replacement within each class."""
    generator = np.random.default_rng(1)
    classes = target().numpy()
    means = np.stack(
        [
            [scores[generator.choice(np.flatnonzero(classes == label), SIZES[label])].mean() for _ in range(draws)]
            for label in range(6)
        ],
        axis=1,
    )
    groups = [means.mean(1), *(means[:, 2 * number : 2 * number + 2].mean(1) for number in range(3))]
    return {name: np.quantile(values, [0.025, 0.975]) for name, values in zip(SHOTS, groups, strict=True)}


@pytest.mark.parametrize("models", [1, 3])
def test_accuracy_equals_resampling_of_images(models):
    correct = predictions(models)
    found = bootstrap_accuracy(correct, target(), COUNTS, draws=4000)
    expected = resampled_images(correct.double().mean(0).numpy())
    for name in SHOTS:
        assert (found[name].low, found[name].high) == pytest.approx(expected[name], abs=0.025), name


@pytest.mark.parametrize("models", [1, 3])
def test_difference_equals_paired_resampling_of_images(models):
    correct, baseline = predictions(models), predictions(models, seed=1, rate=0.4)
    baseline |= correct & (torch.arange(sum(SIZES)) % 3 > 0)  # often right on the same images
    found = bootstrap_difference(correct, baseline, target(), COUNTS, draws=4000)
    expected = resampled_images((correct.double() - baseline.double()).mean(0).numpy())
    for name in SHOTS:
        assert (found[name].low, found[name].high) == pytest.approx(expected[name], abs=0.025), name


def test_two_images_give_the_exact_distribution():
    """Of 2 images with 1 correct, draws have 0, 1 and 2 correct with probability 1/4, 1/2 and 1/4."""
    correct, labels = torch.tensor([True, False]), torch.tensor([0, 0])
    for level, bounds in ((0.45, (0.5, 0.5)), (0.55, (0.0, 1.0))):
        interval = bootstrap_accuracy(correct, labels, [500], level=level)["overall"]
        assert interval == (0.5, *bounds)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=30), st.integers(0, 9))
def test_estimates_are_those_of_the_metrics_and_order_does_not_matter(rows, seed):
    labels, first, second = (torch.tensor(column) for column in zip(*rows, strict=True))
    counts = [500, 50, 5, 3]
    total = torch.bincount(labels, minlength=4)
    results = [shot_metrics(torch.bincount(labels[correct], minlength=4), total, counts) for correct in (first, second)]
    found = bootstrap_accuracy(first, labels, counts, draws=50, seed=seed)
    difference = bootstrap_difference(first, second, labels, counts, draws=50, seed=seed)
    for name in SHOTS:
        values = [getattr(result, name) for result in results]
        if values[0] is None:
            assert found[name] is difference[name] is None
            continue
        assert found[name].estimate == pytest.approx(values[0])
        assert difference[name].estimate == pytest.approx(values[0] - values[1])
        assert 0 <= found[name].low <= found[name].high <= 1 + 1e-12
        assert -1 - 1e-12 <= difference[name].low <= difference[name].high <= 1 + 1e-12
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    assert bootstrap_accuracy(first[order], labels[order], counts, draws=50, seed=seed) == found


def test_a_model_and_itself_differ_by_exactly_nothing():
    for interval in bootstrap_difference(predictions(3), predictions(3), target(), COUNTS, draws=100).values():
        assert interval == (0, 0, 0)


def test_pairs_are_narrower_than_separate_intervals():
    labels = torch.arange(400) % 4
    first = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.5
    second = first ^ (torch.arange(400) < 8)  # 8 predictions differ
    counts = [500, 300, 200, 150]
    paired = bootstrap_difference(first, second, labels, counts)["overall"]
    alone = bootstrap_accuracy(first, labels, counts)["overall"]
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)


def test_own_images_of_each_model_are_resampled_independently():
    """The mean of two independent samples has half the variance of a single sample."""
    labels = torch.arange(400) % 4
    correct = (torch.arange(400) // 4) % 2 == 0
    counts = [500, 300, 200, 150]
    same = bootstrap_accuracy(correct.expand(2, -1), labels, counts)["overall"]
    own = bootstrap_accuracy(correct.expand(2, -1), labels.expand(2, -1), counts)["overall"]
    assert own.estimate == same.estimate == 0.5
    assert (own.high - own.low) / (same.high - same.low) == pytest.approx(2**-0.5, abs=0.05)


def test_intervals_cover_the_true_accuracy():
    """Of 400 test sets with 5 classes of 40 images, the nominal 95 % interval covers 94 % (normal approximation)."""
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.6])
    labels = torch.arange(200) % 5
    covered = 0
    for seed in range(400):
        correct = torch.rand(200, generator=generator) < rates[labels]
        interval = bootstrap_accuracy(correct, labels, [500] * 5, draws=400, seed=seed)["overall"]
        covered += interval.low <= float(rates.mean()) <= interval.high
    assert 0.91 < covered / 400 < 0.98  # standard deviation of the share: 0.012


def test_paired_intervals_cover_the_true_difference():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(200) % 5
    covered = 0
    for seed in range(400):
        common = torch.rand(200, generator=generator) < 0.6
        changes = torch.rand(2, 200, generator=generator) < torch.tensor([[0.2], [0.1]])
        interval = bootstrap_difference(
            common | changes[0], common & ~changes[1], labels, [500] * 5, draws=400, seed=seed
        )["overall"]
        covered += interval.low <= 0.4 * 0.2 + 0.6 * 0.1 <= interval.high
    assert 0.91 < covered / 400 < 0.98


def test_memory_limit_does_not_change_the_kind_of_result(monkeypatch):
    expected = bootstrap_accuracy(predictions(3), target(), COUNTS, draws=3000)["overall"]
    monkeypatch.setattr(bootstrap, "_MAX_BYTES", 1000)  # a few draws at a time
    found = bootstrap_accuracy(predictions(3), target(), COUNTS, draws=3000)["overall"]
    assert found == pytest.approx(expected, abs=0.02)


def test_seeds_determine_the_draws():
    first, again, other = (bootstrap_accuracy(predictions(), target(), COUNTS, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


FLAGS, LABELS = torch.tensor([True, False]), torch.tensor([0, 1])
WRONG = [
    (FLAGS.long(), LABELS, [9, 9], r"correct must be bool .* torch.int64 \(2,\): pass prediction == target"),
    ([True, False], LABELS, [9, 9], "correct must be bool .*list"),
    (FLAGS.view(2, 1, 1), LABELS, [9, 9], "correct must be bool"),
    (FLAGS[:0], LABELS[:0], [9, 9], "correct is empty"),
    (FLAGS, LABELS[:1], [9, 9], "target has 1 images and correct 2"),
    (FLAGS, LABELS.expand(2, -1), [9, 9], "target has 2 rows and correct 1"),
    (FLAGS, LABELS + 1, [9, 9], r"target\[1\]=2 is out of range"),
    (FLAGS, LABELS, [9, -1], "class_counts"),
]


@pytest.mark.parametrize(("correct", "labels", "counts", "words"), WRONG)
def test_wrong_inputs_are_named(correct, labels, counts, words):
    with pytest.raises(InputError, match=words):
        bootstrap_accuracy(correct, labels, counts)


def test_pairs_need_the_same_shape():
    with pytest.raises(InputError, match=r"correct \(1, 2\) and baseline \(1, 1\) must have the same shape"):
        bootstrap_difference(FLAGS, FLAGS[:1], LABELS, [9, 9])


@pytest.mark.parametrize("option", [{"draws": 0}, {"level": 1.0}, {"level": "0.9"}, {"seed": -1}])
def test_wrong_options_are_named(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        bootstrap_accuracy(FLAGS, LABELS, [9, 9], **option)
