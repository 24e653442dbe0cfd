"""Ridge regression and the router against definitions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft.errors import InputError
from lpt_peft.router import (
    RidgeSums,
    Router,
    RouterLayout,
    expand,
    normalized_tokens,
    random_projection,
    ridge,
    same_groups,
    selection_gap,
)


def minimize(x, y, penalty):
    """The minimizer of the penalized squared error, from the normal equations with the bias as a column."""
    centered = x - x.mean(0)
    scale = (centered**2).sum() / x.shape[1]
    design = np.concatenate([x, np.ones((len(x), 1))], 1)
    penalties = np.diag([penalty * scale] * x.shape[1] + [0.0])
    solution = np.linalg.solve(design.T @ design + penalties, design.T @ y)
    return solution[:-1].T, solution[-1]


@given(st.integers(5, 30), st.integers(1, 8), st.integers(1, 4), st.sampled_from([1e-3, 0.1, 10.0]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_ridge_is_the_minimizer(rows, width, size, penalty, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(rows, width)) + 3, rng.normal(size=(rows, size))
    weight, bias = ridge(torch.from_numpy(x), torch.from_numpy(y), penalty)
    expected_weight, expected_bias = minimize(x, y, penalty)
    np.testing.assert_allclose(weight, expected_weight, atol=1e-8)
    np.testing.assert_allclose(bias, expected_bias, atol=1e-7)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_sums_do_not_depend_on_the_batches(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(sum(sizes), width, generator=generator) for width in (4, 3))
    parts, whole = RidgeSums(), RidgeSums()
    for features, targets in zip(x.split(sizes), y.split(sizes), strict=True):
        parts.update(features, targets)
    whole.update(x, y)
    assert parts.count == whole.count == sum(sizes)
    for found, expected in zip(parts.solve([0.1, 1.0]), whole.solve([0.1, 1.0]), strict=True):
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


def test_squared_error_and_addition():
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    first, second = RidgeSums(), RidgeSums()
    first.update(x[:12], y[:12])
    second.update(x[12:], y[12:])
    weight, bias = first.solve([0.2])[0]
    expected = (x[12:] @ weight.T + bias - y[12:]).square().mean()
    assert second.squared_error(weight, bias) == pytest.approx(float(expected), rel=1e-9)
    for found, whole in zip((first + second).solve([0.2])[0], ridge(x, y, 0.2), strict=True):
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


def test_constant_and_repeated_features_are_no_problem():
    x = torch.randn(10, 1).expand(-1, 3).clone()
    x[:, 2] = 5
    weight, bias = ridge(x, x[:, :1], 1e-9)
    torch.testing.assert_close(x.double() @ weight.T + bias, x[:, :1].double(), atol=1e-6, rtol=0)
    weight, bias = ridge(torch.ones(4, 2), torch.tensor([[1.0], [2.0], [3.0], [6.0]]), 0.1)
    assert not weight.any()
    assert float(bias) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(3, 2), torch.ones(4, 2), 0.1), "features has 3 rows and targets 4"),
        ((torch.ones(0, 2), torch.ones(0, 2), 0.1), "0 rows"),
        ((torch.ones(3, 2), torch.ones(3, 2), 0.0), r"penalty=0.0 must be above 0"),
        ((torch.ones(3, 2), torch.ones(3, 2), float("inf")), r"penalty=inf must be above 0 and finite"),
        ((torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 2), 0.1), "features must be floating point"),
        ((torch.ones(3, 2), torch.ones(3), 0.1), "targets must be floating point of shape"),
    ],
)
def test_refused_regressions(arguments, words):
    with pytest.raises(InputError, match=words):
        ridge(*arguments)


@pytest.mark.parametrize("width", [0, 5])
def test_the_router_predicts_by_its_formula(width):
    weight, bias, inputs = torch.randn(3, 4 + width), torch.randn(3), torch.randn(6, 4)
    projection = np.random.RandomState(7).standard_normal((4, width)).astype(np.float32)
    hidden = np.maximum(inputs.numpy() @ projection / 2, 0)
    expected = np.concatenate([inputs.numpy(), hidden], 1) @ weight.numpy().T + bias.numpy()
    router = Router(weight, bias, RouterLayout(width=width, seed=7))
    np.testing.assert_allclose(router(inputs), expected, rtol=1e-5, atol=1e-5)
    assert router(inputs.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(router(inputs), router(inputs), rtol=0, atol=0)
        assert router(inputs).dtype == torch.float32
    assert copy.deepcopy(router)(inputs).equal(router(inputs))
    assert router.double()(inputs.double()).dtype == torch.float64
    assert f"random={width}" in repr(router)


def test_random_features_repeat_with_the_seed():
    first = random_projection(3, 4, 1)
    assert torch.equal(first, random_projection(3, 4, 1))
    assert not torch.equal(first, random_projection(3, 4, 2))
    # The first values of numpy's legacy generator for seed 1, which numpy guarantees.
    torch.testing.assert_close(first.flatten()[:3], torch.tensor([1.6243454, -0.6117564, -0.5281718]))
    inputs = torch.randn(2, 3)
    assert expand(inputs, torch.empty(3, 0)) is inputs


def test_tokens_are_normalized_one_by_one():
    first, second = torch.randn(2, 4), 100 * torch.randn(2, 4) + 7
    found = normalized_tokens([first, None, second])
    assert found.shape == (2, 8)
    torch.testing.assert_close(found[:, :4], F.layer_norm(first, (4,)))
    torch.testing.assert_close(found[:, 4:].mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, 4:].std(1, correction=0), torch.ones(2))


@given(st.integers(2, 8), st.data())
@settings(max_examples=40, deadline=None)
def test_gap_and_agreement(size, data):
    top_k = data.draw(st.integers(1, size))
    rows = [data.draw(st.permutations(range(size))) for _ in range(2)]
    first, second = (torch.tensor([row]).double() for row in rows)
    ranked = sorted(rows[0], reverse=True)
    gap = float(selection_gap(first, top_k))
    assert gap == (float("inf") if top_k == size else ranked[top_k - 1] - ranked[top_k])
    chosen = [set(sorted(range(size), key=lambda i, row=row: -row[i])[:top_k]) for row in rows]
    assert bool(same_groups(first, second, top_k)) == (chosen[0] == chosen[1])
