"""Sampler, loss and metrics on the class counts of Places-LT: 365 classes, 62,500 images, 4,980 down to 5."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lpt_peft import SHOT_RULES, DualSampler, agcl_loss
from lpt_peft.metrics import shot_groups

COUNTS = json.loads((Path(__file__).parent / "places_lt_counts.json").read_text())["class_counts"]
LABELS = np.repeat(np.arange(365), COUNTS)


def test_an_epoch_contains_every_image_and_every_class_equally_often():
    half = 73  # a fifth of the classes: complete cycles of the class-balanced half
    batches = list(DualSampler(LABELS, 2 * half, num_batches=5 * 172))
    instance = [index for batch in batches for index in batch[:half]]
    assert sorted(instance[:62_500]) == list(range(62_500))
    balanced = Counter(int(LABELS[index]) for batch in batches for index in batch[half:])
    assert set(balanced.values()) == {172}, "every class once per cycle"


def test_loss_equals_the_formula_in_numpy():
    generator = np.random.default_rng(0)
    cosine, target = generator.uniform(-1, 1, (8, 365)), generator.integers(0, 365, 8)
    noise = np.clip(generator.normal(0, 1 / 3, (8, 365)), -1, 1)
    gap = np.log(max(COUNTS)) - np.log(COUNTS)
    z = 20 * (cosine - 0.5 * np.abs(noise) * gap / gap.max() - 0.1 * np.eye(365)[target])
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    weight = np.where(np.eye(365)[target] == 1, (1 - p) ** 0.5, p**8)
    smooth = 0.9 * np.eye(365)[target] + 0.1 / 365
    expected = -(smooth * weight * np.log(p)).sum(1).mean()
    loss = agcl_loss(
        torch.from_numpy(20 * cosine),
        torch.from_numpy(target),
        COUNTS,
        torch.from_numpy(noise),
        gamma_pos=0.5,
        gamma_neg=8,
    )
    assert float(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rule", ["lift", "oltr", "lpt"])
def test_shot_groups_follow_each_rule(rule):
    many = {"lift": lambda n: n > 100, "oltr": lambda n: n >= 100, "lpt": lambda n: n > 100}[rule]
    few = {"lift": lambda n: n < 20, "oltr": lambda n: n <= 20, "lpt": lambda n: n <= 20}[rule]
    assert shot_groups(COUNTS, SHOT_RULES[rule]).tolist() == [0 if many(n) else 2 if few(n) else 1 for n in COUNTS]
