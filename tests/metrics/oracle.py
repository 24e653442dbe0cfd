"""Brute-force metrics and random inputs for the tests of the metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lpt_peft.metrics import ShotMetrics

COUNTS = [500, 150, 101, 100, 60, 21, 20, 19, 3, 0]
SIZE = len(COUNTS)


def draw(images, size=SIZE, seed=0, absent=(), dtype=torch.float32):
    """Logits that are right about a third of the time, and targets without the absent classes."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([label for label in range(size) if label not in absent])
    target = allowed[torch.randint(len(allowed), (images,), generator=generator)]
    logits = torch.randn(images, size, generator=generator, dtype=torch.float64)
    logits[torch.arange(images), target] += 2.0 * torch.rand(images, generator=generator, dtype=torch.float64)
    return logits.to(dtype), target


def filled(logits, target, **settings):
    metrics = ShotMetrics(COUNTS, **settings)
    metrics.update(logits, target)
    return metrics


def brute(predicted, target, is_many, is_few, average):
    """Every figure but the calibration error, by loops over images written from the definitions."""
    hits = {}
    for guess, truth in zip(predicted, target, strict=True):
        hits.setdefault(truth, []).append(guess == truth)
    accuracy = {label: sum(hits[label]) / len(hits[label]) for label in hits}

    def mean(labels):
        labels = [label for label in labels if label in hits]
        if not labels:
            return None
        if average == "class":
            return sum(accuracy[label] for label in labels) / len(labels)
        return sum(sum(hits[label]) for label in labels) / sum(len(hits[label]) for label in labels)

    labels = range(SIZE)
    worst = min(hits, key=lambda label: (accuracy[label], label))
    zero = 0.0 in accuracy.values()
    return {
        "num_images": len(target),
        "overall": mean(labels),
        "many": mean(j for j in labels if is_many(COUNTS[j])),
        "medium": mean(j for j in labels if not is_many(COUNTS[j]) and not is_few(COUNTS[j])),
        "few": mean(j for j in labels if is_few(COUNTS[j])),
        "accuracy": sum(sum(row) for row in hits.values()) / len(target),
        "balanced_accuracy": sum(accuracy.values()) / len(accuracy),
        "geometric_mean": 0.0 if zero else math.prod(accuracy.values()) ** (1 / len(accuracy)),
        "harmonic_mean": 0.0 if zero else len(accuracy) / sum(1 / value for value in accuracy.values()),
        "worst_class": worst,
        "worst_accuracy": accuracy[worst],
        "absent_classes": [j for j in labels if j not in hits],
        "per_class": [accuracy.get(j) for j in labels],
    }


def brute_ece(logits, target, bins=15):
    """Guo et al. (2017), equation 3, in float64 by a loop over bins (a, b]."""
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    confidence, hit = probabilities.max(1), probabilities.argmax(1) == target
    error = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            error += inside.sum() / len(target) * abs(hit[inside].mean() - confidence[inside].mean())
    return error


def assert_same(result, expected, abs=1e-12):
    """Equal figures by name; numbers and lists of numbers up to `abs`."""
    assert set(expected) == set(result)
    for name, value in expected.items():
        values, figures = (value, result[name]) if isinstance(value, list) else ([value], [result[name]])
        assert len(values) == len(figures), name
        for figure, reference in zip(figures, values, strict=True):
            assert figure == (pytest.approx(reference, abs=abs) if isinstance(reference, float) else reference), name
