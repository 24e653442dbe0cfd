"""Input validation of the metrics."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch

from lpt_peft.errors import InputError, LPTError
from lpt_peft.metrics import ShotMetrics, shot_groups, shot_metrics
from tests.metrics.oracle import COUNTS, SIZE, draw, filled


class Output(NamedTuple):
    """The output of a model."""

    logits: torch.Tensor
    features: torch.Tensor


GOOD = torch.zeros(2, SIZE)
LABELS = torch.tensor([1, 2])
INVALID_BATCHES = {
    "too large": (GOOD, torch.tensor([1, SIZE]), r"target\[1\]=10 is out of range.*0 to 9.*class_counts"),
    "negative": (GOOD, torch.tensor([-1, 1]), r"target\[0\]=-1 is out of range"),
    "predicted too large": (torch.tensor([SIZE, 0]), LABELS, r"logits\[0\]=10 is out of range"),
    "one-hot target": (
        GOOD,
        GOOD.long(),
        r"target must be integers \(N,\), not torch.int64 of shape \(2, 10\).*argmax",
    ),
    "float target": (GOOD, LABELS.float(), r"target must be integers \(N,\), not torch.float32 .*target\.long\(\)"),
    "column of labels": (GOOD, LABELS[:, None], r"not torch.int64 of shape \(2, 1\)\. Pass target\.squeeze\(1\)\."),
    "soft target": (
        GOOD,
        GOOD.softmax(1),
        r"shape \(2, 10\)\. Convert rows of scores with target\.argmax",
    ),
    "mapping": (GOOD, {0: 1, 1: 2}, "target must be a tensor or sequence of integers, not a dict"),
    "generator": (GOOD, (label for label in [1, 2]), "target must be a tensor or sequence of integers"),
    "unlabeled": (GOOD, [1, None], "a tensor or sequence of integers, not a list whose entry 1 is None"),
    "large": (GOOD, np.array([1, 2**63], dtype=np.uint64), r"target\[1\]=.* is out of range"),
    "bool target": (GOOD, LABELS.bool(), r"target must be integers \(N,\), not torch.bool"),
    "words": (GOOD, ["a", "b"], "sequence of integers, not a list whose entry 0 is 'a'"),
    "ragged": (GOOD, [[1], [1, 2]], "target must be a tensor or sequence of integers"),
    "output": (Output(GOOD, GOOD), LABELS, r"logits is of type Output, not a tensor: pass output\.logits"),
    "tuple": ((GOOD, GOOD), LABELS, "logits must be one-dimensional, not a tuple of arrays or tensors"),
    "pair": (GOOD, (LABELS, LABELS, 0.5), "target must be one-dimensional, not a tuple of arrays or tensors"),
    "columns": (torch.zeros(2, SIZE - 1), LABELS, r"logits must be \(B, 10\).*not \(2, 9\)"),
    "no columns": (torch.zeros(2), LABELS, r"logits must be \(B, 10\).*not \(2,\).*integers"),
    "three dimensions": (torch.zeros(2, 3, SIZE), LABELS, r"logits must be \(B, 10\)"),
    "integer scores": (GOOD.long(), LABELS, r"logits must be integers \(N,\).*argmax"),
    "complex": (GOOD.to(torch.complex64), LABELS, "logits must be integers"),
    "rows": (torch.zeros(3, SIZE), LABELS, "logits has 3 rows, but target has 2 labels"),
    "predicted rows": (torch.tensor([1]), LABELS, "logits has 1 rows, but target has 2 labels"),
}


@pytest.mark.parametrize("case", INVALID_BATCHES)
def test_invalid_batch_changes_nothing(case):
    logits, target, words = INVALID_BATCHES[case]
    metrics = filled(*draw(30))
    before = metrics.state_dict()
    with pytest.raises(InputError, match=words):
        metrics.update(logits, target)
    assert all(torch.equal(before[name], tensor) for name, tensor in metrics.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_without_softmax(value, dtype):
    logits, target = draw(5, dtype=dtype)
    logits[3, 2] = value
    metrics = ShotMetrics(COUNTS)
    with pytest.raises(InputError, match=r"logits\[3\] contains NaN or \+inf"):
        metrics.update(logits, target)
    with pytest.raises(InputError, match=r"logits\[0\] .*only -inf"):
        metrics.update(torch.full((1, SIZE), -math.inf, dtype=dtype), target[:1])
    assert metrics.compute().num_images == 0


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([5, -1], r"class_counts\[1\]=-1 is negative"),
        ([], "class_counts"),
        (np.unique([0, 1, 1], return_counts=True), "not a tuple of arrays or tensors.*bincount"),
        (torch.empty(0, dtype=torch.int64), "class_counts is empty"),
        ([1.5, 2.0], "class_counts must be integers .*float32.*bincount"),
        ([True, False], "class_counts must be integers .*bool"),
        ([[1, 2]], r"class_counts must be integers .*\(1, 2\)"),
        (7, "class_counts must be integers"),
        ({0: 5, 2: 3}, "class_counts is a dict .* missing 1, out of range 2"),
        ({"cat": 5, "dog": 3}, "class_counts has 'cat' where an integer label is needed"),
        (Counter([0, 0, 1]).values(), "class_counts is a dict_values"),
        ({5, 3}, "class_counts is a set"),
        ({0: 5, 1: -3}, r"class_counts\[1\]=-3 is negative"),
        (["a"], "class_counts must be a tensor or sequence of integers"),
        (None, "class_counts must be a tensor or sequence of integers"),
    ],
)
def test_invalid_class_counts(counts, words):
    for call in (ShotMetrics, shot_groups, lambda counts: shot_metrics([1], [1], counts)):
        with pytest.raises(InputError, match=words) as caught:
            call(counts)
        assert isinstance(caught.value, (LPTError, ValueError))


def test_invalid_counters():
    with pytest.raises(InputError, match="correct exceeds total for class 1"):
        shot_metrics([1, 3], [2, 2], [5, 5])
    with pytest.raises(InputError, match="one entry per class, not 1, 2 and 2"):
        shot_metrics([1], [2, 2], [5, 5])
    with pytest.raises(InputError, match=r"total\[0\]=-2 is negative"):
        shot_metrics([0, 0], [-2, 2], [5, 5])


def test_counts_as_mappings_are_sorted_by_label():
    labels = [2, 2, 2, 0, 1, 1]
    assert ShotMetrics(Counter(labels)).class_counts.tolist() == [1, 2, 3]
    assert shot_groups({"1": 5, "0": 500}).tolist() == [0, 2]
    result = shot_metrics(correct=Counter([1, 0]), total=Counter([1, 1, 0]), class_counts={1: 5, 0: 500})
    assert (result.many, result.few) == (1.0, 0.5)
    assert ShotMetrics.from_rule("lpt", Counter(labels)).class_counts.tolist() == [1, 2, 3]


def test_labels_of_a_table_and_sparse_labels():
    pandas = pytest.importorskip("pandas")
    logits, target = draw(30)
    expected = filled(logits, target).compute()
    order = np.random.default_rng(0).permutation(30)
    assert filled(logits, pandas.Series(target.numpy(), index=order)).compute() == expected
    assert filled(logits, target.to_sparse()).compute() == expected
