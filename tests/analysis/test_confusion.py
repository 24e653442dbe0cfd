"""Confused pairs and weak classes against loops."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from lpt_peft.analysis import confused_pairs, weak_classes
from lpt_peft.errors import ConfigError, InputError

LABELS = st.integers(0, 4)


@given(st.lists(st.tuples(LABELS, LABELS), max_size=60))
@settings(max_examples=60, deadline=None)
def test_pairs_match_scikit_learns_matrix(rows):
    target, predicted = torch.tensor(rows, dtype=torch.long).view(-1, 2).unbind(1)
    found = confused_pairs(target, predicted, 5)
    pairs = list(zip(found.target.tolist(), found.prediction.tolist(), found.images.tolist(), strict=True))
    target = target.tolist()
    matrix = confusion_matrix(target, predicted.tolist(), labels=range(5)).tolist() if rows else [[0] * 5] * 5
    assert {(t, p): n for t, p, n in pairs} == {
        (t, p): matrix[t][p] for t in range(5) for p in range(5) if t != p and matrix[t][p]
    }
    totals = Counter(target)
    assert found.share.tolist() == pytest.approx([n / totals[t] for t, _, n in pairs])
    keys = [(-n, -n / totals[t], t, p) for t, p, n in pairs]
    assert keys == sorted(keys)
    two = confused_pairs(torch.tensor(target).long(), predicted, 5, limit=2)
    assert two.images.tolist() == found.images.tolist()[:2]


def test_many_classes_need_no_matrix():
    classes = 2**20  # a matrix would take 8 TiB
    found = confused_pairs([classes - 1, 3], [0, 3], classes)
    assert (found.target.tolist(), found.prediction.tolist(), found.share.tolist()) == ([classes - 1], [0], [1.0])


@given(st.lists(st.integers(0, 6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1, max_size=45))
@settings(max_examples=60, deadline=None)
def test_weak_classes_match_loops(rows):
    correct, total = [row[0] for row in rows], [row[1] for row in rows]
    found = weak_classes(correct, total)
    assert list(found.never_right) == [c for c, (right, images) in enumerate(rows) if images and not right]
    present = sorted((right / images, c) for c, (right, images) in enumerate(rows) if images)
    worst = present[: -(-len(present) // 20)]
    assert list(found.worst) == [c for _, c in worst]
    if worst:
        assert found.worst_accuracy == pytest.approx(sum(rate for rate, _ in worst) / len(worst))
    else:
        assert found.worst_accuracy is None


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: confused_pairs([0, 1], [0], 2), InputError, "1 labels for 2 rows"),
        (lambda: confused_pairs([0, 2], [0, 0], 2), InputError, "target\\[1\\]=2 is out of range"),
        (lambda: confused_pairs([0], [0], 1, limit=-1), ConfigError, "limit=-1"),
        (lambda: weak_classes([1], [0]), InputError, "correct exceeds total"),
        (lambda: weak_classes([1, 1], [1]), InputError, "2 classes"),
        (lambda: weak_classes([1], [1], share=0), ConfigError, "share=0"),
        (lambda: weak_classes([1], [1], share=1.5), ConfigError, "share=1.5"),
        (lambda: weak_classes(torch.tensor([0.5]), [1]), InputError, "must be integers"),
    ],
)
def test_errors_name_input_and_rule(call, error, words):
    with pytest.raises(error, match=words):
        call()
