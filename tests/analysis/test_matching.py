"""Statistics of matching against scikit-learn and loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from lpt_peft.analysis import group_histogram, matching_statistics
from lpt_peft.errors import ConfigError, InputError

HISTOGRAMS = st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=6)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.permutations(range(5)).map(lambda order: order[:2])), max_size=30),
)
@settings(max_examples=40, deadline=None)
def test_histogram_counts_images(rows):
    labels = torch.tensor([label for label, _ in rows], dtype=torch.int64)
    groups = torch.tensor([chosen for _, chosen in rows], dtype=torch.int64).view(-1, 2)
    found = group_histogram(groups, labels, 4, 5)
    expected = [[sum(label == c and g in chosen for label, chosen in rows) for g in range(5)] for c in range(4)]
    assert found.tolist() == expected


@given(HISTOGRAMS)
@settings(max_examples=60, deadline=None)
def test_statistics_match_scikit_learn_and_definitions(rows):
    counts = torch.tensor(rows)
    result = matching_statistics(counts)
    total = sum(map(sum, rows))
    usage = [sum(column) for column in zip(*rows, strict=True)]
    assert result.usage.tolist() == usage
    assert list(result.unused) == [group for group, count in enumerate(usage) if not count]
    if not total:
        assert (result.group_entropy, result.mutual_information, result.chance) == (None, None, None)
        return
    expected = mutual_info_score(None, None, contingency=counts.numpy()) / math.log(2)
    assert result.mutual_information == pytest.approx(expected, abs=1e-9)
    assert result.group_entropy == pytest.approx(-sum(n / total * math.log2(n / total) for n in usage if n))
    for row, entropy in zip(rows, result.class_entropy.tolist(), strict=True):
        if sum(row):
            assert entropy == pytest.approx(-sum(n / sum(row) * math.log2(n / sum(row)) for n in row if n))
        else:
            assert math.isnan(entropy)
    assert 0 <= result.mutual_information <= result.group_entropy + 1e-9


def test_chance_level_is_the_mutual_information_of_independent_selections():
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        labels = torch.randint(4, (300,), generator=generator)
        groups = torch.randint(6, (300, 1), generator=generator)
        result = matching_statistics(group_histogram(groups, labels, 4, 6))
        found.append((result.mutual_information, result.chance))
    information, chance = (sum(column) / len(found) for column in zip(*found, strict=True))
    assert chance == pytest.approx(3 * 5 / (2 * 300 * math.log(2)), rel=1e-9)
    assert information == pytest.approx(chance, rel=0.1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: group_histogram(torch.tensor([0, 0]), [0, 0], 1, 1),
            InputError,
            "groups must be integers",
        ),
        (lambda: group_histogram(torch.zeros(2, 1), [0, 0], 1, 1), InputError, "groups must be integers"),
        (lambda: group_histogram([[0]], [0], 1, 1), InputError, "groups must be integers"),
        (lambda: group_histogram(torch.tensor([[2]]), [0], 1, 2), InputError, "values from 2 to 2"),
        (lambda: group_histogram(torch.tensor([[0]]), [0, 0], 1, 2), InputError, "2 labels for 1 rows"),
        (lambda: group_histogram(torch.tensor([[0]]), [0], 0, 2), ConfigError, "num_classes=0"),
        (lambda: matching_statistics(torch.zeros(2, 2)), InputError, "histogram must be integers"),
        (lambda: matching_statistics(torch.tensor([[-1]])), InputError, "negative count"),
    ],
)
def test_errors_name_input_and_rule(call, error, words):
    with pytest.raises(error, match=words):
        call()
