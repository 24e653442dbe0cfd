"""The suggestion of a learning-rate range test, and its picture."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lpt_peft.recipe import LearningRateCurve, draw_learning_rates
from lpt_peft.recipe.learning_rate.curve import has_risen, smooth

RATES = [10 ** (-4 + 6 * step / 99) for step in range(100)]


def falling(center, *, start=7.0, end=2.0, seed=None, noise=0.4):
    """Losses that fall from start to end around a rate, and rise again 2.5 decades above it."""
    generator = np.random.default_rng(seed)
    losses = []
    for rate in RATES:
        distance = math.log10(rate / center)
        fallen = 1 / (1 + math.exp(-6 * distance))
        risen = 5 / (1 + math.exp(-6 * (distance - 2.5)))
        losses.append(start - (start - end) * fallen + risen + (noise * generator.normal() if seed is not None else 0))
    return losses


def curve(losses, rates=RATES):
    return LearningRateCurve(phase="shared", rates=rates[: len(losses)], losses=losses)


@pytest.mark.parametrize("center", [0.01, 0.05, 0.3])
def test_the_suggestion_is_where_three_quarters_of_the_drop_are_done(center):
    """The logistic curve has completed three quarters at log10(rate / center) = ln(3) / 6."""
    exact = center * 10 ** (math.log(3) / 6)
    assert curve(falling(center)).suggestion == pytest.approx(exact, rel=0.25)


@pytest.mark.parametrize("seed", range(20))
def test_noise_moves_the_suggestion_little(seed):
    suggestion = curve(falling(0.05, seed=seed)).suggestion
    assert 0.05 / 2 < suggestion < 0.05 * 5
    assert curve(falling(0.05, seed=seed)[:70]).suggestion == pytest.approx(suggestion, rel=0.5), "an early end"


@given(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=60), st.floats(0.5, 5.0))
def test_smoothing_is_a_weighted_mean(losses, width):
    steps = np.arange(len(losses))
    weights = np.exp(-((steps[:, None] - steps) ** 2) / (2 * width**2))
    weights[np.abs(steps[:, None] - steps) > math.ceil(3 * width)] = 0
    np.testing.assert_allclose(smooth(losses, width), weights @ losses / weights.sum(1), atol=1e-9)


@given(st.floats(0.1, 10.0), st.floats(-3.0, 3.0))
def test_the_suggestion_depends_on_neither_scale_nor_offset_of_the_loss(scale, offset):
    losses = falling(0.05, seed=1)
    changed = [scale * loss + offset for loss in losses]
    assert curve(changed).suggestion == curve(losses).suggestion


@pytest.mark.parametrize("losses", [[3.0] * 100, [3.0, 2.0], [], [3 + 0.3 * (-1) ** step for step in range(100)]])
def test_no_suggestion_without_a_drop(losses):
    assert curve(losses).suggestion is None


def test_rising_losses_give_no_suggestion():
    assert curve([2 + rate for rate in RATES]).suggestion is None


def test_the_test_ends_when_the_loss_has_risen():
    losses = [loss if rate < 15 else 12.0 for rate, loss in zip(RATES, falling(0.05), strict=True)]
    ends = [has_risen(losses[:step]) for step in range(1, 101)]
    first = ends.index(True)
    assert 15 < RATES[first] < 30, "within five steps"
    noise = np.random.default_rng(0).normal(2.7, 0.5, 100).tolist()
    assert not any(has_risen(noise[:size]) for size in range(100))
    assert has_risen([3.0] * 20 + [6.0] * 5)


def test_json_and_picture(tmp_path):
    found = curve(falling(0.05, seed=0))
    content = json.loads(json.dumps(found.to_dict()))
    assert list(content) == ["phase", "suggestion", "learning_rate", "loss", "smoothed_loss"]
    assert content["smoothed_loss"] == found.smoothed
    pictures = []
    for number, each in enumerate([found, curve([3.0] * 100)]):
        draw_learning_rates(each, tmp_path / f"{number}.png")
        pictures.append(np.asarray(Image.open(tmp_path / f"{number}.png").convert("RGB")).astype(int))
    orange = [(np.abs(picture - [255, 127, 14]).sum(2) < 30).any(0).sum() for picture in pictures]
    assert orange[0] > 0, "a vertical line at the suggestion"
    assert orange[1] == 0, "and none without a suggestion"
