"""Batches of logits that are not on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from lpt_peft.errors import InputError
from lpt_peft.metrics import ShotMetrics
from tests.host_reads import count_host_reads
from tests.metrics.oracle import COUNTS, SIZE, draw, filled


@pytest.fixture
def deferred(monkeypatch):
    """Treat logits on the CPU like logits on an accelerator."""
    monkeypatch.setattr("lpt_peft.metrics.accumulator._on_host", lambda tensor: False)


def test_pending_logits_are_transferred_once(deferred):
    logits, target = draw(300, dtype=torch.float32)
    metrics = ShotMetrics(COUNTS)
    with count_host_reads() as reads:
        for start in range(0, 300, 70):
            metrics.update(logits[start : start + 70], target[start : start + 70])
    assert all("metrics/checks.py" in location for location in reads.locations), "labels are checked on the CPU"
    metrics.update(target[:5], target[:5])  # predicted labels in between
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lpt_peft.metrics.accumulator._on_host", lambda tensor: True)
        expected = filled(logits, target)
        expected.update(target[:5], target[:5])
    assert metrics.compute() == expected.compute() == metrics.compute()
    assert torch.equal(metrics.state_dict()["counters"], expected.state_dict()["counters"])


@pytest.mark.parametrize("call", ["compute", "state_dict", "merge", "merged"])
def test_pending_batches_are_counted_on_request(deferred, call):
    logits, target = draw(20)
    metrics, other = filled(logits, target), ShotMetrics(COUNTS)
    if call == "merged":
        counters = other.merge(metrics).state_dict()["counters"]
    elif call == "merge":
        counters = metrics.merge(other).state_dict()["counters"]
    else:
        getattr(metrics, call)()
        counters = metrics._counters
    assert int(counters[SIZE : 2 * SIZE].sum()) == 20


@pytest.mark.parametrize("forget", ["reset", "load_state_dict"])
def test_pending_batches_are_reset(deferred, forget):
    metrics = filled(*draw(20))
    if forget == "reset":
        metrics.reset()
    else:
        metrics.load_state_dict(ShotMetrics(COUNTS).state_dict())
    assert metrics.compute().num_images == 0


def test_pending_logits_without_softmax(deferred):
    metrics = ShotMetrics(COUNTS)
    for number in range(3):
        logits, target = draw(10, seed=number)
        logits[4, 2] = math.nan if number == 1 else 0.0
        metrics.update(logits, target)
    with pytest.raises(InputError, match=r"logits\[14\] contains NaN or \+inf"):
        metrics.compute()
    assert metrics.compute().num_images == 0
