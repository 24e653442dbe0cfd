"""The query regularizer against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft.errors import InputError
from lpt_peft.losses import query_regularizer


def by_hand(query, features, keys):
    """The formula on lists of floats."""

    def softmax_of_cosines(row):
        cosines = []
        for key in keys:
            dot = sum(a * b for a, b in zip(row, key, strict=True))
            cosines.append(dot / math.sqrt(sum(a * a for a in row)) / math.sqrt(sum(b * b for b in key)))
        weights = [math.exp(value) for value in cosines]
        return [weight / sum(weights) for weight in weights]

    total = 0.0
    for q, r in zip(query, features, strict=True):
        pairs = zip(softmax_of_cosines(q), softmax_of_cosines(r), strict=True)
        total += sum((a - b) ** 2 for a, b in pairs)
    return total / len(query)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_formula(rows, size, width, seed):
    generator = torch.Generator().manual_seed(seed)
    query, features, keys = (torch.randn(n, width, generator=generator).double() for n in (rows, rows, size))
    expected = by_hand(query.tolist(), features.tolist(), keys.tolist())
    assert float(query_regularizer(query, features, keys)) == pytest.approx(expected, abs=1e-12)
    assert float(query_regularizer(3 * query, query, 0.1 * keys)) == pytest.approx(0, abs=1e-15), "cosines only"


def test_gradients_reach_the_keys_and_the_query_but_not_the_features():
    query, features = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    keys = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    query_regularizer(query, features, keys).backward()
    assert features.grad is None
    assert bool(query.grad.any())
    step = 1e-6 * torch.randn(keys.shape, dtype=torch.float64)
    difference = query_regularizer(query, features, keys + step) - query_regularizer(query, features, keys - step)
    assert float(difference / 2) == pytest.approx(float((keys.grad * step).sum()), rel=1e-6)


def test_the_dtype_is_at_least_float32():
    values = torch.randn(3, 4)
    assert query_regularizer(values.bfloat16(), values.bfloat16(), values.bfloat16()).dtype == torch.float32
    assert query_regularizer(values.bfloat16(), values, values.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(2, 3), torch.ones(2, 4), torch.ones(5, 3)), r"features must be .*\(B, 3\).*feature width"),
        ((torch.ones(2, 4), torch.ones(2, 3), torch.ones(5, 3)), r"query must be .*\(B, 3\)"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(5, 3, dtype=torch.int64)), r"keys must be floating point"),
    ],
)
def test_refused_shapes(arguments, words):
    with pytest.raises(InputError, match=words):
        query_regularizer(*arguments)
