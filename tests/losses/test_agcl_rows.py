"""Closed form of A-GCL: blocks of rows, branches, derivatives and torch.func."""

from __future__ import annotations

import pytest
import torch

from lpt_peft.losses import AGCLLoss, agcl_loss
from lpt_peft.losses import agcl_definition as definition
from lpt_peft.losses import agcl_rows as rows_module
from tests.losses.oracle import BRANCHES, COUNTS, batch, plain_agcl, plain_delta, with_gradient


@pytest.mark.parametrize(
    "gammas", [(0.0, 4.0), (0.5, 8.0), (1.0, 1.0), (0.3, 2.7), (2.0, 0.0), (0.0, 11.0), (1.0, 40.0)]
)
@pytest.mark.parametrize("rows", [7, 16])
def test_blocks_and_exponents_match_plain_formula(gammas, rows, monkeypatch):
    """Blocks of two rows, complete and incomplete; integer, fractional and large exponents."""
    monkeypatch.setattr(rows_module, "_BLOCK", 2 * len(COUNTS))
    gamma_pos, gamma_neg = gammas
    logits, target, noise = batch(rows)
    logits = logits / 4  # keeps all negative weights above the floor
    keywords = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg}
    expected = with_gradient(lambda x: plain_agcl(x, target, plain_delta(COUNTS), noise, s=5.0, **keywords), logits)
    actual = with_gradient(
        lambda x: agcl_loss(x, target, COUNTS, noise, scale=5.0, reduction="none", **keywords), logits
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gammas", [((0.5, 0.0), (8.0, 4.0)), ((0.5, 0.5), (4.0, 4.0)), ((0.0, 2.0), (0.0, 1.5))])
@pytest.mark.parametrize("gradient", [True, False])
def test_exponent_columns_equal_exponent_numbers(gammas, gradient, monkeypatch):
    """Path of a GPU: all rows at once, with columns of exponents."""
    logits, target, noise = batch(8)
    branches = definition.Branches(*gammas, 20.0, 0.1, 0.5, 0.1, plain_delta(COUNTS))
    logits.requires_grad_(gradient)
    upstream = torch.arange(1.0, 9.0, dtype=torch.float64)

    def loss_and_gradient():
        loss = rows_module.agcl_rows(logits, target, noise, branches)
        return (loss, *torch.autograd.grad(loss, logits, upstream)) if gradient else (loss,)

    by_numbers = loss_and_gradient()
    columns = [definition.gamma_column(values, logits, torch.float64) for values in gammas]
    monkeypatch.setattr(rows_module, "_blocks", lambda *args: iter([(slice(0, 8), *columns)]))
    torch.testing.assert_close(loss_and_gradient(), by_numbers, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e6, 1e17])
@pytest.mark.parametrize("branch", BRANCHES)
def test_definition_and_closed_form_agree_for_extreme_logits(branch, size):
    generator = torch.Generator().manual_seed(0)
    logits = size * torch.randn(64, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(6, (64,), generator=generator)
    gammas = ((value,) for value in BRANCHES[branch].values())
    branches = definition.Branches(*gammas, 20.0, 0.1, 0.5, 0.1, plain_delta(COUNTS))
    actual = with_gradient(lambda x: rows_module.agcl_rows(x, target, definition.Noise.NONE, branches), logits)
    expected = with_gradient(lambda x: definition.agcl_of_labels(x, target, definition.Noise.NONE, branches), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("branch", BRANCHES)
def test_first_and_second_derivatives(branch):
    logits, target, noise = batch(5)
    logits = (logits / 4).requires_grad_()
    loss = AGCLLoss(COUNTS, scale=5.0, **BRANCHES[branch])
    assert torch.autograd.gradcheck(lambda x: loss(x, target, noise), logits)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, target, noise), logits)
    expected = torch.autograd.functional.hessian(
        lambda x: plain_agcl(x, target, plain_delta(COUNTS), noise, s=5.0, **BRANCHES[branch]).mean(), logits
    )
    actual = torch.autograd.functional.hessian(lambda x: loss(x, target, noise), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_second_derivative_uses_the_drawn_noise(monkeypatch):
    """Compare with differences of first derivatives under the same seed, in blocks of two rows."""
    monkeypatch.setattr(rows_module, "_BLOCK", 2 * len(COUNTS))
    logits, target, _ = batch(5)
    logits = (logits / 4).requires_grad_()
    direction = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6)
    loss = AGCLLoss(COUNTS, scale=5.0, **BRANCHES["instance"])

    def slope(x, create_graph=False):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return torch.autograd.grad(loss(x, target), x, create_graph=create_graph)[0]

    first = slope(logits, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), logits)
    step = 1e-5 * direction
    expected = (slope(logits + step) - slope(logits - step)) / 2e-5
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-9)
    without_noise = torch.autograd.grad(loss.eval()(logits, target), logits)[0]
    assert not torch.allclose(first, without_noise)


def test_torch_func():
    logits, target, noise = batch(6)
    loss = AGCLLoss(COUNTS, gamma_pos=0.5, reduction="sum")
    _, expected = with_gradient(lambda x: loss(x, target, noise), logits)
    torch.testing.assert_close(torch.func.grad(lambda x: loss(x, target, noise))(logits), expected)
    per_row = torch.func.vmap(torch.func.grad(lambda x, y, e: loss(x[None], y[None], e[None])))
    torch.testing.assert_close(per_row(logits, target, noise), expected)
    _, slope = torch.func.jvp(lambda x: loss(x, target, noise), (logits,), (noise,))
    torch.testing.assert_close(slope, (expected * noise).sum())
    drawn = torch.func.vmap(lambda x: loss(x, target), randomness="different")(torch.stack([logits, logits]))
    assert drawn[0] != drawn[1]
