"""Focal loss, LDAM, class-balanced loss and balanced softmax against plain formulas and by property."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft.errors import ConfigError, InputError
from lpt_peft.losses import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    balanced_softmax_loss,
    class_balanced_loss,
    class_balanced_weights,
    dual_sampling_counts,
    focal_loss,
    ldam_loss,
    logit_adjusted_loss,
)
from tests.host_reads import count_host_reads
from tests.losses.oracle import COUNTS, batch, with_gradient

CLASSES = len(COUNTS)
WEIGHTS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 7.0], dtype=torch.float64)

FUNCTIONS = {
    "focal": lambda x, t, **k: focal_loss(x, t, **k),
    "ldam": lambda x, t, **k: ldam_loss(x, t, COUNTS, **k),
    "class-balanced": lambda x, t, **k: class_balanced_loss(x, t, COUNTS, **k),
    "balanced softmax": lambda x, t, **k: balanced_softmax_loss(x, t, COUNTS, **k),
}
MODULES = {
    "focal": FocalLoss,
    "ldam": lambda **k: LDAMLoss(COUNTS, **k),
    "class-balanced": lambda **k: ClassBalancedLoss(COUNTS, **k),
    "balanced softmax": lambda **k: BalancedSoftmaxLoss(COUNTS, **k),
}


def plain_weights(beta):
    """Weights (C,) by the paper: one over the effective number, with sum C."""
    effective = [sum(beta**power for power in range(n)) for n in COUNTS]  # (1 - beta ** n) / (1 - beta)
    inverse = [1 / number for number in effective]
    return torch.tensor([CLASSES * value / sum(inverse) for value in inverse], dtype=torch.float64)


def plain_label(z, y, name, k):
    """Loss of a row `z` for the label y, by the equations of the docstrings, for autograd in float64."""
    weight = k.get("class_weights", torch.ones(CLASSES, dtype=torch.float64))[y]
    gamma = k.get("gamma", {"focal": 2.0}.get(name, 0.0))
    if name == "class-balanced":
        weight = plain_weights(k.get("beta", 0.9999))[y]
    if name == "ldam":
        constant = k.get("max_margin", 0.5) / (1 / min(COUNTS) ** 0.25)
        margin = constant / COUNTS[y] ** 0.25
        z = torch.stack([value - k.get("scale", 20.0) * margin * (j == y) for j, value in enumerate(z)])
    if name == "balanced softmax":
        z = z + torch.tensor(COUNTS, dtype=torch.float64).log()
    p = z.exp() / z.exp().sum()
    return -weight * (1 - p[y]) ** gamma * p[y].log()


def plain(logits, matrix, name, k):
    """Losses (B,) for targets (B, C): the expectation over labels."""
    return torch.stack(
        [sum(t[y] * plain_label(z, y, name, k) for y in range(CLASSES)) for z, t in zip(logits, matrix, strict=True)]
    )


OPTIONS = [
    ("focal", {}),
    ("focal", {"gamma": 0.0}),
    ("focal", {"gamma": 0.5, "class_weights": WEIGHTS}),
    ("ldam", {}),
    ("ldam", {"scale": 5.0, "max_margin": 0.2, "class_weights": WEIGHTS}),
    ("class-balanced", {}),
    ("class-balanced", {"beta": 0.9, "gamma": 1.5}),
    ("balanced softmax", {}),
]


@pytest.mark.parametrize("kind", ["labels", "one-hot", "mixed"])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("as_module", [False, True])
def test_matches_plain_formula(as_module, name, options, kind):
    logits, labels, _ = batch(8)
    logits = logits / 4
    one_hot = F.one_hot(labels, CLASSES).double()
    mixed = 0.3 * one_hot + 0.7 * one_hot.flip(0)
    target, matrix = {"labels": (labels, one_hot), "one-hot": (one_hot, one_hot), "mixed": (mixed, mixed)}[kind]
    if as_module:
        loss = MODULES[name](reduction="none", **options)
    else:
        loss = lambda x, t: FUNCTIONS[name](x, t, reduction="none", **options)  # noqa: E731
    expected = with_gradient(lambda x: plain(x, matrix, name, options), logits)
    actual = with_gradient(lambda x: loss(x, target), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    mean, total = (FUNCTIONS[name](logits, target, reduction=r, **options) for r in ("mean", "sum"))
    torch.testing.assert_close([mean, total], [actual[0].mean(), actual[0].sum()])


def test_focal_loss_equals_torchvision_for_two_classes():
    """torchvision has a sigmoid for each class: the same for the logits (0, x), another loss for more classes."""
    sigmoid_focal_loss = pytest.importorskip("torchvision.ops").sigmoid_focal_loss
    x = torch.linspace(-8, 8, 33, dtype=torch.float64)
    for label in (0, 1):
        target = torch.full((33,), label)
        weights = torch.tensor([0.75, 0.25], dtype=torch.float64)
        actual = focal_loss(torch.stack([0 * x, x], 1), target, class_weights=weights, reduction="none")
        torch.testing.assert_close(actual, sigmoid_focal_loss(x, target.double(), alpha=0.25, gamma=2.0))
    logits = torch.tensor([[2.0, 0.0, 1.0]])
    other = sigmoid_focal_loss(logits, torch.tensor([[1.0, 0, 0]]), alpha=-1, reduction="sum")
    assert not torch.isclose(focal_loss(logits, torch.tensor([0])), other)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_neutral_settings_equal_cross_entropy(reduction):
    logits, labels, _ = batch()
    for target in (labels, F.softmax(logits.flip(0), 1)):
        expected = with_gradient(lambda x, t=target: F.cross_entropy(x, t, reduction=reduction), logits)
        for loss in (
            FocalLoss(gamma=0.0, reduction=reduction),
            LDAMLoss(COUNTS, max_margin=0.0, reduction=reduction),
            ClassBalancedLoss(COUNTS, beta=0.0, reduction=reduction),
            ClassBalancedLoss([7] * CLASSES, reduction=reduction),
            BalancedSoftmaxLoss([7] * CLASSES, reduction=reduction),
        ):
            actual = with_gradient(lambda x, t=target, loss=loss: loss(x, t), logits)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_weighted_cross_entropy_up_to_the_divisor_of_the_mean():
    logits, labels, _ = batch()
    options = {"weight": plain_weights(0.99), "reduction": "none"}
    actual = class_balanced_loss(logits, labels, COUNTS, beta=0.99, reduction="none")
    torch.testing.assert_close(actual, F.cross_entropy(logits, labels, **options))


def test_equal_counts_give_the_same_margin_to_all_classes():
    logits, labels, _ = batch()
    moved = logits - 20 * 0.3 * F.one_hot(labels, CLASSES)
    actual = ldam_loss(logits, labels, [9] * CLASSES, max_margin=0.3)
    torch.testing.assert_close(actual, F.cross_entropy(moved, labels))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 2**40), min_size=1, max_size=6),
    beta=st.one_of(st.just(0.0), st.floats(1e-30, 1 - 1e-12)),
)
def test_class_balanced_weights_by_property(counts, beta):
    """Positive, sum C, larger for rarer classes, between equal weights and inverse counts."""
    weights = class_balanced_weights(counts, beta=beta)
    assert weights.isfinite().all()
    assert (weights > 0).all() or max(counts) / min(counts) > 2**24
    assert weights.sum().item() == pytest.approx(len(counts), rel=1e-5)
    order = sorted(range(len(counts)), key=counts.__getitem__)
    for rarer, other in zip(order, order[1:], strict=False):
        ratio = (weights[rarer] / weights[other].clamp_min(1e-30)).item()
        assert 1 - 1e-5 <= ratio <= counts[other] / counts[rarer] * (1 + 1e-5)


def test_class_balanced_weights_near_the_limit_of_beta():
    counts = [5000, 50, 5]
    inverse = torch.tensor([3 / n / sum(1 / m for m in counts) for n in counts])
    torch.testing.assert_close(class_balanced_weights(counts, beta=1 - 1e-9), inverse, rtol=1e-4, atol=0)
    torch.testing.assert_close(class_balanced_weights(torch.tensor(COUNTS), beta=0.999).double(), plain_weights(0.999))


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(list(FUNCTIONS)),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=12, max_size=12),
    soft=st.booleans(),
    gamma=st.sampled_from([0.0, 1e-3, 0.5, 2.0, 40.0]),
)
def test_loss_and_gradient_are_finite_for_all_finite_logits(name, values, soft, gamma):
    target = torch.tensor([[0.25, 0.75, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1.0]]) if soft else torch.tensor([1, 5])
    options = {"gamma": gamma} if name in ("focal", "class-balanced") else {}
    loss, gradient = with_gradient(lambda x: FUNCTIONS[name](x, target, **options), torch.tensor(values).view(2, 6))
    assert loss.isfinite()
    assert loss >= 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_of_probabilities_when_a_class_is_certain(name):
    """In float32, 1 - p of the most probable class is 0; its log-odds still are accurate."""
    logits = torch.tensor([[40.0, 0.0, -1.0, 0.0, 0.0, 0.0]])
    target = torch.tensor([[0.5, 0.5, 0, 0, 0, 0]])
    expected = with_gradient(lambda x: plain(x, target.double(), name, {}).sum(), logits.double())
    actual = with_gradient(lambda x: FUNCTIONS[name](x, target), logits)
    torch.testing.assert_close([v.double() for v in actual], list(expected), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype, name):
    logits, labels, _ = batch(dtype=dtype)
    expected = FUNCTIONS[name](logits.double(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for target in (labels.to(torch.int16), F.one_hot(labels, CLASSES).to(dtype)):
            loss, gradient = with_gradient(lambda x, t=target: FUNCTIONS[name](x, t), logits)
            assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
            torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("soft", [False, True])
def test_derivatives_and_torch_func(name, soft):
    logits, labels, _ = batch(4)
    target = 0.9 * F.one_hot(labels, CLASSES).double() + 0.1 / CLASSES if soft else labels
    loss = MODULES[name](reduction="sum")
    leaf = (logits / 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, target), leaf)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, target), leaf)
    _, expected = with_gradient(lambda x: loss(x, target), logits)
    per_row = torch.func.vmap(torch.func.grad(lambda x, y: loss(x[None], y[None])))
    torch.testing.assert_close(per_row(logits, target), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_module_habits(name):
    logits, labels, _ = batch(dtype=torch.float32)
    loss = MODULES[name]()
    expected = FUNCTIONS[name](logits, labels)
    assert loss(logits, labels) == expected
    copies = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss).half(), loss.eval()]
    assert all(twin(logits, labels) == expected for twin in copies)
    assert not loss.state_dict()
    assert "reduction=mean" in repr(loss)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for target in (labels, F.one_hot(labels, CLASSES).float()):
        torch.testing.assert_close(compiled(logits, target), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_host_reads_and_unchecked_targets(name, monkeypatch):
    """On a GPU: no synchronization, a failed assertion for a label out of range, NaN for an invalid row."""
    monkeypatch.setattr("lpt_peft.losses.checks.can_read_values", lambda tensor: False)
    for device in ("cpu", "meta"):
        loss, logits = MODULES[name]().to(device), torch.randn(3, 6, device=device, requires_grad=True)
        for target in (torch.zeros(3, dtype=torch.long, device=device), torch.full((3, 6), 1 / 6, device=device)):
            with count_host_reads() as reads:
                loss(logits, target).backward()
            assert reads == [], reads.locations
    for label in (-100, -1, 6):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            MODULES[name]()(torch.zeros(1, 6), torch.tensor([label]))
    rows = MODULES[name](reduction="none")(torch.zeros(2, 6), torch.eye(6)[:2] * torch.tensor([[1.0], [2]]))
    assert rows.isnan().tolist() == [False, True]


def test_assigned_weights_counts_and_settings_take_effect():
    logits, labels, _ = batch(dtype=torch.float32)
    weights = class_balanced_weights(COUNTS)
    for loss, function in ((FocalLoss(), FUNCTIONS["focal"]), (LDAMLoss(COUNTS), FUNCTIONS["ldam"])):
        loss.class_weights = weights
        assert loss(logits, labels) == function(logits, labels, class_weights=weights) != function(logits, labels)
        assert torch.equal(loss.half().class_weights, weights), "half() must not round the weights"
        loss.class_weights = None
        assert loss(logits, labels) == function(logits, labels)
        with pytest.raises(InputError, match=r"class_weights\[1\]=-1 must be a finite number of at least 0"):
            loss.class_weights = torch.tensor([1.0, -1.0])
        assert loss.class_weights is None
    loss = LDAMLoss(COUNTS)
    loss.max_margin, loss.class_counts = 0.2, [3, 3, 2, 50, 7, 1]
    assert loss(logits, labels) == ldam_loss(logits, labels, [3, 3, 2, 50, 7, 1], max_margin=0.2)
    balanced = ClassBalancedLoss(COUNTS)
    balanced.beta, balanced.gamma = 0.9, 1.0
    assert balanced(logits, labels) == class_balanced_loss(logits, labels, COUNTS, beta=0.9, gamma=1.0)


def test_balanced_softmax_is_logit_adjustment_with_tau_one():
    logits, labels, _ = batch()
    expected = logit_adjusted_loss(logits, labels, COUNTS, label_smoothing=0.1)
    assert balanced_softmax_loss(logits, labels, COUNTS, label_smoothing=0.1) == expected
    assert isinstance(BalancedSoftmaxLoss(COUNTS), LogitAdjustedLoss)
    assert "tau" not in repr(BalancedSoftmaxLoss(COUNTS))


@given(counts=st.lists(st.integers(1, 2**30), min_size=1, max_size=8))
def test_dual_sampling_counts_are_the_mean_of_both_halves(counts):
    found = dual_sampling_counts(counts)
    shares = [(n / sum(counts) + 1 / len(counts)) / 2 for n in counts]
    torch.testing.assert_close(found.double() / found.sum(), torch.tensor(shares, dtype=torch.float64))


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: FocalLoss(gamma=-1), ConfigError, "gamma=-1 must be a finite number of at least 0"),
        (lambda: FocalLoss(reduction="avg"), ConfigError, "reduction='avg'"),
        (lambda: FocalLoss(class_weights=[1.0, 2.0]), InputError, r"class_weights must be .* \(C,\), not list: use"),
        (lambda: FocalLoss(class_weights=torch.ones(2, 2)), InputError, r"not torch.float32 of shape \(2, 2\)"),
        (lambda: FocalLoss(class_weights=torch.ones(2).long()), InputError, "not torch.int64 of shape"),
        (lambda: FocalLoss(class_weights=torch.tensor([1, math.nan])), InputError, r"class_weights\[1\]=nan"),
        (lambda: LDAMLoss([5, 0]), InputError, r"class_counts\[1\]=0 "),
        (lambda: LDAMLoss([5, 1], scale=0), ConfigError, "scale=0 must be a finite number greater than 0"),
        (lambda: LDAMLoss([5, 1], max_margin=math.inf), ConfigError, "max_margin=inf must be a finite number"),
        (lambda: ClassBalancedLoss([5, 1], beta=1.0), ConfigError, "beta=1.0 must be .* at least 0 and below 1"),
        (lambda: ClassBalancedLoss([5, 1], beta=-0.1), ConfigError, "beta=-0.1 must be .* at least 0 and below 1"),
        (lambda: ClassBalancedLoss([5, 0]), InputError, r"class_counts\[1\]=0 "),
        (lambda: class_balanced_weights([5, 1], beta=1), ConfigError, "beta=1 must be"),
        (lambda: class_balanced_weights([5, 0]), InputError, r"class_counts\[1\]=0 "),
        (lambda: dual_sampling_counts([5, 0]), InputError, r"class_counts\[1\]=0 "),
        (lambda: BalancedSoftmaxLoss([5, 0]), InputError, r"class_counts\[1\]=0 "),
        (lambda: focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma="2"), ConfigError, "gamma='2'"),
        (lambda: focal_loss(torch.zeros(1, 2), torch.tensor([2])), InputError, "label 2, but the classes are 0 to 1"),
        (
            lambda: focal_loss(torch.zeros(1, 3), torch.tensor([0]), class_weights=torch.ones(2)),
            InputError,
            "logits have 3 columns, but class_weights has 2 entries",
        ),
        (
            lambda: ldam_loss(torch.zeros(1, 3), torch.tensor([0]), [5, 1]),
            InputError,
            "logits have 3 columns, but class_counts has 2 entries",
        ),
        (
            lambda: FocalLoss(class_weights=torch.ones(2)).to("meta")(torch.zeros(1, 2), torch.tensor([0])),
            InputError,
            "The loss is on meta, but logits are on cpu",
        ),
        (
            lambda: class_balanced_loss(torch.zeros(1, 2), torch.ones(1, 2), [5, 1]),
            InputError,
            r"target\[0\] must be probabilities",
        ),
        (lambda: ldam_loss([[0.0, 1.0]], torch.tensor([0]), [5, 1]), InputError, "logits must be a tensor"),
    ],
)
def test_invalid_inputs(build, error, words):
    with pytest.raises(error, match=words):
        build()
