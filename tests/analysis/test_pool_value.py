"""Value of the pool against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft.analysis import pool_value
from lpt_peft.errors import InputError

LABELS = st.integers(0, 3)


def accuracy(predicted, target, label=None):
    hits = [p == t for p, t in zip(predicted, target, strict=True) if label is None or t == label]
    return sum(hits) / len(hits) if hits else None


def balanced(predicted, target):
    rates = [accuracy(predicted, target, label) for label in range(4) if label in target]
    return sum(rates) / len(rates)


@given(st.lists(st.tuples(LABELS, LABELS, st.lists(LABELS, min_size=3, max_size=3)), min_size=1, max_size=25))
@settings(max_examples=60, deadline=None)
def test_accuracies_match_loops(rows):
    target, chosen = [row[0] for row in rows], [row[1] for row in rows]
    fixed = [[row[2][group] for row in rows] for group in range(3)]
    value = pool_value({"chosen": chosen}, target, 4, fixed=torch.tensor(fixed))
    assert value.rows["chosen"].accuracy == pytest.approx(accuracy(chosen, target))
    assert value.rows["chosen"].balanced_accuracy == pytest.approx(balanced(chosen, target))
    assert value.rows["fixed"].balanced_accuracy == pytest.approx(max(balanced(row, target) for row in fixed))
    present = sorted(set(target))
    best = {label: max(accuracy(row, target, label) for row in fixed) for label in present}
    assert value.rows["oracle"].balanced_accuracy == pytest.approx(sum(best.values()) / len(best))
    for label, group in enumerate(value.oracle_groups.tolist()):
        if label in present:
            assert accuracy(fixed[group], target, label) == pytest.approx(best[label])
        else:
            assert group == -1
            assert math.isnan(value.rows["oracle"].per_class[label])


def test_logits_and_predictions_give_the_same_rows():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    target = torch.randint(4, (50,), generator=torch.Generator().manual_seed(1))
    value = pool_value({"logits": logits, "labels": logits.argmax(1)}, target, 4)
    assert value.rows["logits"][:2] == value.rows["labels"][:2]
    assert (value.fixed_group, value.oracle_groups, set(value.rows)) == (None, None, {"logits", "labels"})


def test_no_images_give_no_accuracies():
    value = pool_value({"chosen": torch.zeros(0, 2)}, torch.tensor([]).long(), 2, fixed=torch.zeros(3, 0).long())
    assert value.rows["chosen"][:2] == value.rows["oracle"][:2] == (None, None)
    assert value.oracle_groups.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("predictions", "fixed", "words"),
    [
        ({"chosen": [0, 1, 2]}, None, "predictions\\['chosen'\\].*out of range"),
        ({"chosen": [0]}, None, "1 labels for 3 rows"),
        ({"chosen": torch.zeros(3, 3)}, None, "3 columns for 2 classes"),
        ({"chosen": torch.zeros(3)}, None, "logits must be floating point"),
        ({}, torch.zeros(3, dtype=torch.long), "fixed must be"),
        ({}, torch.full((2, 3), 2), "fixed\\[0\\].*out of range"),
    ],
)
def test_errors_name_input_and_rule(predictions, fixed, words):
    with pytest.raises(InputError, match=words):
        pool_value(predictions, [0, 1, 1], 2, fixed=fixed)
