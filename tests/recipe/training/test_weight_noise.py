"""Weight noise: its size, its seed, and weights that are restored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lpt_peft.recipe import run_phase
from lpt_peft.recipe.training.weight_noise import noisy_values
from tests.recipe.tiny import PHASE, SETTINGS, FailingLoss, PowerCut, result_of, same, striped_data, tiny_adapter

NOISY = replace(SETTINGS, weight_noise=0.5)


def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "large": nn.Parameter(20 * torch.randn(300, 100, generator=generator)),
        "zero": nn.Parameter(torch.zeros(3)),
    }


def test_size_of_the_noise():
    parameters = weights()
    before = parameters["large"].detach().clone()
    values = noisy_values(parameters, NOISY, "shared", 0)
    assert torch.equal(parameters["large"], before), "the weights themselves are unchanged"
    noise = (values["large"] - before) / before.square().mean().sqrt()
    assert float(noise.std()) == pytest.approx(0.5 / 3, rel=0.02)
    assert float(noise.abs().max()) == pytest.approx(0.5, abs=1e-4), "clamped at three standard deviations"
    assert float(noise.mean()) == pytest.approx(0, abs=0.005)
    assert not values["zero"].any()


@given(st.floats(1e-3, 1e3), st.floats(0.01, 2.0))
def test_the_noise_is_relative_to_the_weights(scale, rho):
    """Multiplied weights have the multiplied neighborhood: the output of a norm or a cosine does not change."""
    settings = replace(SETTINGS, weight_noise=rho)
    plain = {"w": nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float64))}
    scaled = {"w": nn.Parameter(scale * plain["w"].detach())}
    expected = scale * noisy_values(plain, settings, "shared", 3)["w"]
    torch.testing.assert_close(noisy_values(scaled, settings, "shared", 3)["w"], expected)


def test_the_seed_is_that_of_run_phase_and_step_alone():
    parameters = weights()
    state = torch.get_rng_state()
    first = noisy_values(parameters, NOISY, "shared", 7)["large"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(noisy_values(parameters, NOISY, "shared", 7)["large"], first)
    for other in (
        noisy_values(parameters, NOISY, "shared", 8),
        noisy_values(parameters, NOISY, "group", 7),
        noisy_values(parameters, replace(NOISY, seed=1), "shared", 7),
    ):
        assert not torch.equal(other["large"], first)


def test_without_noise_nothing_is_copied():
    assert noisy_values(weights(), SETTINGS, "shared", 0) is None


def test_a_failing_step_restores_the_weights():
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    adapter.phase = "shared"
    before = result_of(adapter)
    with pytest.raises(PowerCut):
        run_phase(adapter, dataset, labels, NOISY, PHASE, criterion=FailingLoss(0), progress=False)
    assert same(result_of(adapter), before)
