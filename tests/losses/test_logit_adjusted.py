"""Logit-adjusted cross-entropy against the plain formula and cross-entropy, and by property."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft.errors import ConfigError, InputError
from lpt_peft.losses import LogitAdjustedLoss, adjust_logits, logit_adjusted_loss
from tests.host_reads import count_host_reads
from tests.losses.oracle import COUNTS, batch, with_gradient

CLASSES = len(COUNTS)


def plain(logits, target, tau, label_smoothing):
    """Loss (B,) of targets (B, C) by the equation of the docstring."""
    shares = torch.tensor([count / sum(COUNTS) for count in COUNTS], dtype=torch.float64)
    p = (logits.exp() * shares**tau) / (logits.exp() * shares**tau).sum(1, keepdim=True)
    return -(((1 - label_smoothing) * target + label_smoothing / CLASSES) * p.log()).sum(1)


def targets(labels):
    """The same batch as labels, one-hot and mixed probabilities with the matrix of each."""
    one_hot = F.one_hot(labels, CLASSES).double()
    mixed = 0.3 * one_hot + 0.7 * one_hot.flip(0)
    return {"labels": (labels, one_hot), "one-hot": (one_hot, one_hot), "mixed": (mixed, mixed)}


@pytest.mark.parametrize("kind", ["labels", "one-hot", "mixed"])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("as_module", [False, True])
def test_matches_plain_formula(as_module, label_smoothing, tau, kind):
    logits, labels, _ = batch()
    logits = logits / 4
    target, matrix = targets(labels)[kind]
    options = {"tau": tau, "label_smoothing": label_smoothing, "reduction": "none"}
    if as_module:
        loss = LogitAdjustedLoss(COUNTS, **options)
    else:
        loss = lambda x, t: logit_adjusted_loss(x, t, COUNTS, **options)  # noqa: E731
    expected = with_gradient(lambda x: plain(x, matrix, tau, label_smoothing), logits)
    torch.testing.assert_close(with_gradient(lambda x: loss(x, target), logits), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_cross_entropy_without_adjustment(reduction):
    logits, labels, _ = batch()
    expected = F.cross_entropy(logits, labels, reduction=reduction)
    torch.testing.assert_close(logit_adjusted_loss(logits, labels, COUNTS, tau=0, reduction=reduction), expected)
    torch.testing.assert_close(logit_adjusted_loss(logits, labels, [7] * CLASSES, reduction=reduction), expected)


def test_minimum_is_the_balanced_classifier():
    """At the minimum for labels with the training frequencies, logits do not contain the frequencies."""
    counts = [80, 15, 5]
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)  # images without information
    for tau, expected in ((1.0, torch.zeros(3)), (0.0, torch.tensor(counts).double().div(100).log())):
        (gradient,) = torch.autograd.grad(
            logit_adjusted_loss((logits + expected).expand(100, 3), labels, counts, tau=tau), logits
        )
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(autocast, dtype):
    logits, labels, _ = batch(dtype=dtype)
    expected = logit_adjusted_loss(logits.double(), labels, COUNTS)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for target in (labels, F.one_hot(labels, CLASSES).to(dtype)):
            loss, gradient = with_gradient(lambda x, t=target: logit_adjusted_loss(x, t, COUNTS), logits)
            assert loss.dtype == torch.float32
            assert gradient.dtype == dtype
            torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=6, max_size=6),
    counts=st.lists(st.integers(1, 2**40), min_size=3, max_size=3),
    tau=st.sampled_from([0.0, 1.0, 10.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    soft=st.booleans(),
)
def test_loss_and_gradient_are_finite_for_all_finite_logits(values, counts, tau, label_smoothing, soft):
    target = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]) if soft else torch.tensor([1, 2])
    options = {"tau": tau, "label_smoothing": label_smoothing}
    loss, gradient = with_gradient(
        lambda x: logit_adjusted_loss(x, target, counts, **options), torch.tensor(values).view(2, 3)
    )
    assert loss.isfinite()
    assert loss >= 0
    assert gradient.isfinite().all()


def test_module_habits():
    logits, labels, _ = batch(dtype=torch.float32)
    loss = LogitAdjustedLoss(Counter({1: 57, 0: 120, 2: 30, 3: 30, 5: 1, 4: 4}), tau=0.5)
    expected = logit_adjusted_loss(logits, labels, COUNTS, tau=0.5)
    copies = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss).half(), loss.eval()]
    assert all(twin(logits, labels) == expected for twin in copies)
    assert "LogitAdjustedLoss(num_classes=6, tau=0.5, label_smoothing=0.0, reduction=mean)" in repr(loss)
    assert not loss.state_dict()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for target in (labels, F.one_hot(labels, CLASSES).float()):
        torch.testing.assert_close(compiled(logits, target), expected)
    loss.tau = 1.0
    loss.class_counts = [9] * 6
    torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels))


def test_derivatives_and_torch_func():
    logits, labels, _ = batch(4)
    loss = LogitAdjustedLoss(COUNTS, label_smoothing=0.1, reduction="sum")
    leaf = (logits / 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: loss(x, labels), leaf)
    _, expected = with_gradient(lambda x: loss(x, labels), logits)
    per_row = torch.func.vmap(torch.func.grad(lambda x, y: loss(x[None], y[None])))
    torch.testing.assert_close(per_row(logits, labels), expected)


def test_host_reads_and_unchecked_targets(monkeypatch):
    """On a GPU: no synchronization, a failed assertion for a label out of range, NaN for an invalid row."""
    monkeypatch.setattr("lpt_peft.losses.checks.can_read_values", lambda tensor: False)
    for device in ("cpu", "meta"):
        loss, logits = LogitAdjustedLoss(COUNTS).to(device), torch.randn(3, 6, device=device, requires_grad=True)
        for target in (torch.zeros(3, dtype=torch.long, device=device), torch.full((3, 6), 1 / 6, device=device)):
            with count_host_reads() as reads:
                loss(logits, target).backward()
            assert reads == [], reads.locations
    for label in (-100, -1, 6):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            LogitAdjustedLoss(COUNTS)(torch.zeros(1, 6), torch.tensor([label]))
    rows = LogitAdjustedLoss(COUNTS, reduction="none")(torch.zeros(2, 6), torch.eye(6)[:2] * torch.tensor([[1.0], [2]]))
    assert rows.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"class_counts": [5, 0, 3]}, InputError, r"class_counts\[1\]=0 .*at least 1"),
        ({"class_counts": {0: 5, 2: 3}}, InputError, "class_counts is a dict .* missing 1"),
        ({"tau": -1}, ConfigError, "tau=-1 must be a finite number of at least 0"),
        ({"tau": math.inf}, ConfigError, "tau=inf must be a finite number"),
        ({"tau": "1"}, ConfigError, "tau='1' must be a finite number"),
        ({"label_smoothing": 1.5}, ConfigError, "label_smoothing=1.5 must be .* from 0 to 1"),
        ({"reduction": "avg"}, ConfigError, "reduction='avg'"),
    ],
)
def test_invalid_settings(arguments, error, words):
    arguments = {"class_counts": [5, 4, 3], **arguments}
    with pytest.raises(error, match=words):
        LogitAdjustedLoss(**arguments)
    with pytest.raises(error, match=words):
        logit_adjusted_loss(torch.zeros(1, 3), torch.tensor([0]), **arguments)


@pytest.mark.parametrize(
    ("logits", "target", "words"),
    [
        (torch.zeros(2, 3), torch.tensor([0, -100]), "label -100.*drop rows"),
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.long), r"pass target\.squeeze\(1\)"),
        (torch.zeros(2, 3), torch.ones(2, 3), r"target\[0\] must be probabilities.* sum is 3"),
        (torch.zeros(2, 4), torch.tensor([0, 1]), "logits have 4 columns, but class_counts has 3 entries"),
        ([[0.0] * 3], torch.tensor([0]), "logits must be a tensor"),
    ],
)
def test_invalid_batches(logits, target, words):
    with pytest.raises(InputError, match=words):
        LogitAdjustedLoss([5, 4, 3])(logits, target)
    with pytest.raises(InputError, match=words):
        logit_adjusted_loss(logits, target, [5, 4, 3])


def test_adjust_logits_subtracts_the_log_shares():
    logits, _, _ = batch()
    shares = torch.tensor([count / sum(COUNTS) for count in COUNTS], dtype=torch.float64)
    for tau in (0.0, 0.5, 1.0):
        actual = adjust_logits(logits, COUNTS, tau=tau).softmax(1)
        torch.testing.assert_close(actual, (logits - tau * shares.log()).softmax(1), rtol=1e-12, atol=0)
    assert adjust_logits(logits.half(), COUNTS).dtype == torch.float32
    assert torch.equal(adjust_logits(logits, COUNTS)[:, 0], logits[:, 0]), "class 0 is the most frequent class"
    assert adjust_logits(logits[0], COUNTS).shape == (CLASSES,)


@pytest.mark.parametrize(
    ("logits", "options", "error", "words"),
    [
        (torch.zeros(2, 3), {}, InputError, r"floating point \(\.\.\., 6\).* not torch.float32 of shape \(2, 3\)"),
        (torch.zeros(2, 6).long(), {}, InputError, "not torch.int64"),
        ([[0.0] * 6], {}, InputError, "not list"),
        (torch.zeros(2, 6), {"tau": -1}, ConfigError, "tau=-1 must be"),
    ],
)
def test_invalid_inputs_of_adjust_logits(logits, options, error, words):
    with pytest.raises(error, match=words):
        adjust_logits(logits, COUNTS, **options)
