"""A-GCL against recorded tensors and the plain formula, and by property."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lpt_peft.errors import InputError
from lpt_peft.losses import AGCLLoss, agcl_loss
from tests.losses.oracle import BRANCHES, COUNTS, PLAIN_CE, batch, plain_agcl, plain_delta, with_gradient

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


@pytest.mark.parametrize("case", ["balanced_branch", "instance_branch", "no_margin"])
@pytest.mark.parametrize("as_module", [False, True])
def test_matches_recorded_cases(case, as_module):
    with safe_open(GOLDEN / f"agcl_{case}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    config["noise_scale"] = config.pop("noise_mul")
    cosine = golden["cosine"].clone().requires_grad_()
    logits = config["scale"] * cosine
    if as_module:  # half() must not round the counts
        loss = AGCLLoss(golden["class_counts"], **config).half()(logits, golden["target"], golden["noise"])
    else:
        loss = agcl_loss(logits, golden["target"], golden["class_counts"].tolist(), golden["noise"], **config)
    loss.backward()
    assert abs(loss - golden["loss"]) < 1e-9
    torch.testing.assert_close(cosine.grad, golden["grad.cosine"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("counts", [COUNTS, [7] * 6, [2**40, 2**40 - 1, 5, 5, 3, 1], [1000, 999, 998, 1000, 997, 999]])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("branch", BRANCHES)
def test_float64_matches_autograd_of_plain_formula(branch, normalize, counts):
    logits, target, noise = batch()
    delta = plain_delta(counts, normalize)
    nu = 0.5 if normalize else 0.05  # with a raw delta of 27, p would underflow in the plain formula
    expected = with_gradient(lambda x: plain_agcl(x, target, delta, noise, nu=nu, **BRANCHES[branch]), logits)
    keywords = {"normalize": normalize, "noise_scale": nu, "reduction": "none", **BRANCHES[branch]}
    actual = with_gradient(lambda x: agcl_loss(x, target, counts, noise, **keywords), logits)
    for result, reference in zip(actual, expected, strict=True):
        assert result.dtype == torch.float64
        # for near-equal counts, the difference of logarithms in the oracle is only accurate to 1e-12
        torch.testing.assert_close(result, reference, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("counts", [COUNTS, [99_999, 99_998, 99_997, 99_996, 99_995, 99_999]])
@pytest.mark.parametrize("branch", BRANCHES)
def test_low_precision_error_is_rounding_of_logits_and_gradient(branch, autocast, dtype, counts):
    logits, target, noise = batch(dtype=dtype)
    delta = plain_delta(counts)
    expected, slope = with_gradient(
        lambda x: plain_agcl(x, target, delta, noise, **BRANCHES[branch]).mean(), logits.double()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, gradient = with_gradient(lambda x: agcl_loss(x, target, counts, noise, **BRANCHES[branch]), logits)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), slope, rtol=max(eps, 2e-5), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_when_target_probability_rounds_to_one(dtype):
    """Cosine gap of 1.1 at C = 100, where 1 - p_y is 0 in float32 and its square root has no gradient."""
    logits = torch.zeros(1, 100, dtype=dtype)
    logits[0, 3] = 26.0
    target, delta = torch.tensor([3]), torch.zeros(100, dtype=torch.float64)
    only_positive = {"gamma_pos": 0.5, "gamma_neg": 8.0}
    expected, slope = with_gradient(
        lambda x: plain_agcl(x, target, delta, torch.zeros(1, 100), mu=0.0, a=0.0, **only_positive), logits.double()
    )
    assert F.softmax(logits.float(), dim=1)[0, 3] == 1.0
    loss, gradient = with_gradient(
        lambda x: agcl_loss(x, target, [5] * 100, margin=0.0, label_smoothing=0.0, **only_positive), logits
    )
    torch.testing.assert_close(loss.double(), expected.sum(), rtol=1e-3, atol=0)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=0)
    assert gradient[0, 3] < 0


def test_gradient_when_target_probability_is_zero():
    logits = torch.tensor([[-1e4, 1e4, -3e4]])  # p_y = 0, so w_y = 1 and d w_y = 0
    loss, gradient = with_gradient(
        lambda x: agcl_loss(x, torch.tensor([0]), [3, 2, 1], **PLAIN_CE | {"gamma_pos": 0.5}), logits
    )
    assert loss == 2e4
    assert torch.equal(gradient, torch.tensor([[-1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_cross_entropy_when_all_terms_are_off(reduction):
    logits, target, noise = batch()
    expected = with_gradient(lambda x: F.cross_entropy(x, target, reduction=reduction), logits)
    for draw in (None, noise):
        loss = AGCLLoss(COUNTS, reduction=reduction, **PLAIN_CE)
        actual = with_gradient(lambda x, loss=loss, draw=draw: loss(x, target, draw), logits)
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_zero_exponents_equal_label_smoothed_cross_entropy():
    logits, target, _ = batch()
    expected = F.cross_entropy(logits, target, label_smoothing=0.3)
    actual = agcl_loss(logits, target, COUNTS, **PLAIN_CE | {"label_smoothing": 0.3})
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


def test_reductions():
    logits, target, noise = batch()
    rows, mean, total = (agcl_loss(logits, target, COUNTS, noise, reduction=r) for r in ("none", "mean", "sum"))
    assert rows.shape == (16,)
    torch.testing.assert_close(mean, rows.mean())
    torch.testing.assert_close(total, rows.sum())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_integer_dtypes_of_labels(dtype):
    logits, target, noise = batch()
    assert torch.equal(agcl_loss(logits, target.to(dtype), COUNTS, noise), agcl_loss(logits, target, COUNTS, noise))


DTYPES = {torch.float16: 16, torch.bfloat16: 32, torch.float32: 32, torch.float64: 64}


@st.composite
def any_batch(draw):
    dtype = draw(st.sampled_from(list(DTYPES)))
    rows, classes = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    largest = torch.finfo(dtype).max
    width = DTYPES[dtype]
    number = st.one_of(
        st.floats(-largest, largest, width=width), st.floats(-50, 50, width=width), st.sampled_from([largest, -largest])
    )
    values = draw(st.lists(number, min_size=rows * classes, max_size=rows * classes))
    unit = st.floats(-1, 1)
    return {
        "logits": torch.tensor(values, dtype=torch.float64).view(rows, classes).to(dtype),
        "target": torch.tensor(draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))),
        "class_counts": draw(st.lists(st.integers(1, 2**40), min_size=classes, max_size=classes)),
        "noise": torch.tensor(draw(st.lists(unit, min_size=rows * classes, max_size=rows * classes))).view(rows, -1),
    }


exponent = st.sampled_from([0.0, 1e-3, 0.5, 0.999, 1.0, 4.0, 8.0])


@settings(max_examples=100, deadline=None)
@given(
    inputs=any_batch(),
    gamma_pos=exponent,
    gamma_neg=exponent,
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_loss_and_gradient_are_finite_for_all_finite_logits(inputs, **keywords):
    logits = inputs.pop("logits")
    assert logits.isfinite().all()
    loss, gradient = with_gradient(lambda x: agcl_loss(x, **inputs, **keywords), logits)
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    assert gradient.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(8)), classes=st.permutations(range(len(COUNTS))))
def test_permuting_images_or_classes(order, classes):
    logits, target, noise = batch(8)
    keywords = {"reduction": "none", **BRANCHES["instance"]}
    expected = agcl_loss(logits, target, COUNTS, noise, **keywords)
    torch.testing.assert_close(
        agcl_loss(logits[order], target[order], COUNTS, noise[order], **keywords), expected[order], rtol=1e-12, atol=0
    )
    counts, place = [COUNTS[j] for j in classes], torch.tensor([classes.index(j) for j in range(len(COUNTS))])
    moved = agcl_loss(logits[:, classes], place[target], counts, noise[:, classes], **keywords)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)


def test_equal_counts_ignore_noise():
    logits, target, noise = batch()
    expected = plain_agcl(logits, target, torch.zeros(6, dtype=torch.float64), torch.zeros_like(noise)).mean()
    torch.testing.assert_close(agcl_loss(logits, target, [9] * 6, noise), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(AGCLLoss([9] * 6)(logits, target), expected, rtol=1e-12, atol=0)


def drawn_noise(counts, rows=20_000):
    """Recover |noise| of the rare classes (the minimum for two classes) from the loss of a batch of zeros.

    With the frequent class as target and a large scale, odds = scale * noise_scale * min |noise|.
    """
    loss = AGCLLoss(counts, scale=200.0, reduction="none", **PLAIN_CE | {"noise_scale": 0.5})
    target = torch.zeros(rows, dtype=torch.long)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = loss(torch.zeros(rows, len(counts), dtype=torch.float64), target)
    return (-values.expm1().log() / 100).numpy()  # inverse of loss = log(1 + exp(-odds))


def test_training_noise_is_a_clamped_gaussian():
    noise = drawn_noise([100, 1])
    assert noise.max() <= 1 + 1e-9
    clamped = (noise > 1 - 1e-9).mean()
    assert abs(clamped - 2 * scipy.stats.norm.sf(3)) < 0.0015  # 4 standard errors
    inside = noise[noise < 1 - 1e-9] * 3
    test = scipy.stats.kstest(inside, lambda x: scipy.stats.halfnorm.cdf(x) / scipy.stats.halfnorm.cdf(3))
    assert test.pvalue > 0.001


def test_noise_is_independent_per_logit():
    expected = scipy.stats.halfnorm.ppf(1 - 0.5**0.5) / 3  # median of the minimum of two independent draws
    median = sorted(drawn_noise([100, 1, 1]))[10_000]
    assert median == pytest.approx(expected, rel=0.1)


def test_eval_draws_no_noise():
    logits, target, noise = batch()
    loss = AGCLLoss(COUNTS)
    before = torch.get_rng_state()
    without_noise = loss.eval()(logits, target)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(without_noise, agcl_loss(logits, target, COUNTS))
    torch.testing.assert_close(without_noise, plain_agcl(logits, target, plain_delta(COUNTS), 0 * noise).mean())
    assert loss.train()(logits, target) != loss(logits, target)


def test_given_noise_is_used_in_both_modes():
    logits, target, noise = batch()
    loss = AGCLLoss(COUNTS)
    expected = plain_agcl(logits, target, plain_delta(COUNTS), noise).mean()
    before = torch.get_rng_state()
    for mode in (True, False):
        torch.testing.assert_close(loss.train(mode)(logits, target, noise), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_follows_the_default_generator():
    logits, target, _ = batch()
    loss = AGCLLoss(COUNTS)
    with torch.random.fork_rng():
        values = [torch.manual_seed(seed) and loss(logits, target) for seed in (3, 3, 4)]
    assert values[0] == values[1] != values[2]


def test_logits_that_are_not_a_tensor():
    with pytest.raises(InputError, match=r"not SimpleNamespace: pass output\.logits"):
        AGCLLoss([3, 4, 50])(SimpleNamespace(logits=torch.zeros(2, 3)), torch.tensor([0, 1]))
