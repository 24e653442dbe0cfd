"""Probabilities as targets: the loss is the expectation over labels drawn from them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft.losses import AGCLLoss, LPTLoss, agcl_loss
from tests.host_reads import count_host_reads
from tests.losses.oracle import BRANCHES, COUNTS, PLAIN_CE, Output, batch, plain_agcl, plain_delta, with_gradient

CLASSES = len(COUNTS)


def probabilities(kind, rows=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(CLASSES, (2, rows), generator=generator)
    first, second = F.one_hot(labels, CLASSES).to(torch.float64)
    share = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    dense = torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    targets = {"one-hot": first, "mixup": share * first + (1 - share) * second, "dense": dense}
    targets["uniform"] = torch.full_like(first, 1 / CLASSES)
    targets["smoothed mixup"] = 0.9 * targets["mixup"] + 0.1 / CLASSES
    return targets[kind].to(dtype)


KINDS = ["one-hot", "mixup", "dense", "uniform", "smoothed mixup"]


def expectation(logits, target, noise, **keywords):
    """Sum over labels of the probability times the plain loss of the label."""
    delta = plain_delta(COUNTS)
    labels = [torch.full((len(logits),), label) for label in range(CLASSES)]
    losses = [plain_agcl(logits, label, delta, noise, **keywords) for label in labels]
    return (target * torch.stack(losses, 1)).sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gammas", [(0.0, 4.0), (0.5, 8.0), (0.3, 2.7), (1.0, 0.0), (2.0, 1.0)])
def test_matches_expectation_of_the_plain_formula(gammas, kind):
    gamma_pos, gamma_neg = gammas
    logits, _, noise = batch()
    logits = logits / 4  # keeps the plain formula away from underflow
    target = probabilities(kind)
    keywords = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg}
    expected = with_gradient(lambda x: expectation(x, target, noise, s=5.0, **keywords), logits)
    actual = with_gradient(
        lambda x: agcl_loss(x, target, COUNTS, noise, scale=5.0, reduction="none", **keywords), logits
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_hot_equals_class_indices(dtype, branch):
    logits, target, noise = batch(dtype=dtype)
    one_hot = F.one_hot(target, CLASSES).to(dtype)
    expected = with_gradient(lambda x: agcl_loss(x, target, COUNTS, noise, **BRANCHES[branch]), logits)
    actual = with_gradient(lambda x: agcl_loss(x, one_hot, COUNTS, noise, **BRANCHES[branch]), logits)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(actual[1], expected[1], rtol=max(2 * eps, 2e-5), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_cross_entropy_when_all_terms_are_off(reduction, label_smoothing, kind):
    logits, _, _ = batch()
    target = probabilities(kind)
    keywords = {"label_smoothing": label_smoothing, "reduction": reduction}
    expected = with_gradient(lambda x: F.cross_entropy(x, target, **keywords), logits)
    actual = with_gradient(lambda x: agcl_loss(x, target, COUNTS, **PLAIN_CE | keywords), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_is_linear_in_the_target():
    logits, target, noise = batch()
    other = target.roll(3)
    share = torch.linspace(0, 1, 16, dtype=torch.float64)
    mixed = share[:, None] * F.one_hot(target, CLASSES) + (1 - share)[:, None] * F.one_hot(other, CLASSES)
    first, second, both = (
        agcl_loss(logits, labels, COUNTS, noise, reduction="none", gamma_pos=0.5) for labels in (target, other, mixed)
    )
    torch.testing.assert_close(both, share * first + (1 - share) * second, rtol=1e-12, atol=1e-14)


def test_lpt_loss_of_a_mixed_dual_batch():
    """Each half mixed separately equals the weighted sum of two losses with class indices."""
    logits, target, noise = batch(8)
    output = Output(logits, torch.rand(8, 2, dtype=torch.float64))
    partner = torch.cat([half.flip(0) for half in target.chunk(2)])
    mixed = 0.3 * F.one_hot(target, CLASSES).double() + 0.7 * F.one_hot(partner, CLASSES).double()
    criterion = LPTLoss(COUNTS, epochs=4)
    losses = [criterion(output, labels, 1, noise) for labels in (target, partner, mixed)]
    torch.testing.assert_close(losses[2], 0.3 * losses[0] + 0.7 * losses[1], rtol=1e-12, atol=0)
    terms = criterion.terms(output, mixed, 1, noise)
    torch.testing.assert_close(sum(terms.values()), losses[2], rtol=1e-12, atol=0)


DTYPES = {torch.float16: 16, torch.bfloat16: 32, torch.float32: 32, torch.float64: 64}


@st.composite
def any_batch(draw):
    dtype = draw(st.sampled_from(list(DTYPES)))
    rows, classes = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    largest, width = torch.finfo(dtype).max, DTYPES[dtype]
    number = st.one_of(
        st.floats(-largest, largest, width=width), st.floats(-50, 50, width=width), st.sampled_from([largest, -largest])
    )
    size = rows * classes
    values = draw(st.lists(number, min_size=size, max_size=size))
    weights = draw(st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 0.5, 1.0]), min_size=size, max_size=size))
    weights = torch.tensor(weights, dtype=torch.float64).view(rows, classes)
    weights[:, 0] += (weights.sum(1) == 0).double()
    return {
        "logits": torch.tensor(values, dtype=torch.float64).view(rows, classes).to(dtype),
        "target": weights / weights.sum(1, keepdim=True),
        "class_counts": draw(st.lists(st.integers(1, 2**40), min_size=classes, max_size=classes)),
        "noise": torch.tensor(draw(st.lists(st.floats(-1, 1), min_size=size, max_size=size))).view(rows, -1),
    }


exponent = st.sampled_from([0.0, 1e-3, 0.5, 0.999, 1.0, 4.0, 8.0])


@settings(max_examples=150, deadline=None)
@given(inputs=any_batch(), gamma_pos=exponent, gamma_neg=exponent, label_smoothing=st.sampled_from([0.0, 0.1, 1.0]))
def test_finite_and_equal_to_the_expectation_for_all_finite_logits(inputs, gamma_pos, gamma_neg, label_smoothing):
    logits, target = inputs.pop("logits"), inputs.pop("target")
    keywords = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "label_smoothing": label_smoothing, "reduction": "none"}
    loss, gradient = with_gradient(lambda x: agcl_loss(x, target, **inputs, **keywords), logits)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    labels = [torch.full((len(logits),), label) for label in range(target.shape[1])]
    losses = torch.stack([agcl_loss(logits, label, **inputs, **keywords).double() for label in labels], 1)
    expected = (target * losses).sum(1)
    # both round the logits minus margin and noise
    eps = torch.finfo(loss.dtype).eps
    rounding = 50 * eps * (logits.double().abs().amax(1) + 40).clamp(max=1e18)
    assert ((loss - expected).abs() <= rounding).all()
    modest = logits.double().abs().amax(1) <= 50
    assert ((loss - expected).abs()[modest] <= 1000 * eps).all()


def test_derivatives():
    logits, _, noise = batch(4)
    logits = (logits / 4).requires_grad_()
    target = probabilities("dense", 4).requires_grad_()
    loss = AGCLLoss(COUNTS, scale=5.0, gamma_pos=0.5)
    normalized = lambda x, t: loss(x, t / t.sum(1, keepdim=True), noise)  # noqa: E731
    assert torch.autograd.gradcheck(normalized, (logits, target))
    assert torch.autograd.gradgradcheck(normalized, (logits, target))


def test_compile_and_torch_func():
    torch._dynamo.reset()
    logits, _, noise = batch(8, dtype=torch.float32)
    target, output = probabilities("mixup", 8, torch.float32), Output(logits, torch.rand(8, 2))
    for loss, inputs in ((AGCLLoss(COUNTS), logits), (LPTLoss(COUNTS, 4), output)):
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        keywords = {"noise": noise}
        torch.testing.assert_close(compiled(inputs, target, **keywords), loss(inputs, target, **keywords))
    loss = AGCLLoss(COUNTS, reduction="sum")
    _, expected = with_gradient(lambda x: loss(x, target, noise), logits)
    per_row = torch.func.vmap(torch.func.grad(lambda x, t, e: loss(x[None], t[None], e[None])))
    torch.testing.assert_close(per_row(logits, target, noise), expected)


@pytest.mark.parametrize("training", [True, False])
def test_noise_is_drawn_in_training_only(training):
    logits, _, noise = batch()
    target = probabilities("mixup")
    loss = AGCLLoss(COUNTS).train(training)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = [loss(logits, target) for _ in range(2)]
    assert (values[0] == values[1]) is not training
    if not training:
        torch.testing.assert_close(values[0], expectation(logits, target, 0 * noise).mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_of_probabilities_is_accepted(dtype):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(4, 8142, generator=generator, dtype=torch.float64)
    target = (target / target.sum(1, keepdim=True)).to(dtype)
    assert AGCLLoss([1] * 8142)(torch.zeros(4, 8142), target).isfinite()
    smoothed = torch.full((4, 8142), 0.1 / 8142, dtype=dtype)
    smoothed[:, 5] += 0.9
    assert AGCLLoss([1] * 8142)(torch.zeros(4, 8142), smoothed).isfinite()


@pytest.mark.parametrize("row", [[0.5, 0.6, 0, 0, 0, 0], [1.5, -0.5, 0, 0, 0, 0], [torch.nan, 1, 0, 0, 0, 0], [0] * 6])
def test_unchecked_rows_that_are_not_distributions_give_nan(row, monkeypatch):
    """On a GPU, where a check would synchronize."""
    monkeypatch.setattr("lpt_peft.losses.checks.can_read_values", lambda tensor: False)
    logits, target = torch.randn(3, 6), torch.eye(6)[:3]
    target[1] = torch.tensor(row)
    loss, gradient = with_gradient(lambda x: agcl_loss(x, target, COUNTS, reduction="none"), logits)
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


def test_no_host_read(monkeypatch):
    monkeypatch.setattr("lpt_peft.losses.checks.can_read_values", lambda tensor: False)
    for device in ("cpu", "meta"):
        criterion = LPTLoss(COUNTS, 3).to(device)
        logits = torch.randn(8, 6, device=device, requires_grad=True)
        target = torch.full((8, 6), 1 / 6, device=device)
        with count_host_reads() as reads:
            criterion(Output(logits, torch.rand(8, 2, device=device)), target).backward()
        assert reads == [], reads.locations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    logits, _, noise = batch(dtype=torch.float32)
    target = probabilities("mixup", dtype=torch.float32)
    expected = agcl_loss(logits, target, COUNTS, noise, gamma_pos=0.5)
    with torch.autocast("cpu", dtype=dtype):
        loss = agcl_loss(logits, target, COUNTS, noise, gamma_pos=0.5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
