"""A-GCL and LPTLoss against recorded tensors, the plain formula, a loop over numbers, and by property."""

from __future__ import annotations

import copy
import json
import math
import pickle
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch._dynamo.testing import CompileCounter

from lpt_peft.errors import ConfigError, InputError
from lpt_peft.losses import AGCLLoss, LPTLoss, agcl_loss
from lpt_peft.losses import rows as rows_module
from tests.host_reads import count_host_reads

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
COUNTS = [120, 57, 30, 30, 4, 1]
PLAIN_CE = {"margin": 0.0, "noise_scale": 0.0, "gamma_pos": 0.0, "gamma_neg": 0.0, "label_smoothing": 0.0}
BRANCHES = {"balanced": {"gamma_pos": 0.0, "gamma_neg": 4.0}, "instance": {"gamma_pos": 0.5, "gamma_neg": 8.0}}


class Output(NamedTuple):
    logits: torch.Tensor
    similarity: torch.Tensor


def plain_agcl(logits, target, delta, noise, *, s=20.0, mu=0.1, nu=0.5, gamma_pos=0.0, gamma_neg=4.0, a=0.1):
    """method.md section 4, letter by letter: (B,) losses, for autograd in float64."""
    y = F.one_hot(target, len(delta)).to(logits.dtype)
    z = logits - s * (nu * noise.abs() * delta + mu * y)
    p = z.softmax(dim=1)
    w = torch.where(y > 0, (1 - p) ** gamma_pos, p**gamma_neg)
    return -(((1 - a) * y + a / len(delta)) * w * p.log()).sum(dim=1)


def plain_delta(counts, normalize=True):
    logs = [math.log(max(counts)) - math.log(n) for n in counts]
    largest = max(logs) if normalize and max(logs) > 0 else 1.0
    return torch.tensor([value / largest for value in logs], dtype=torch.float64)


def scalar_agcl(logits, y, delta, noise, *, gamma_pos, gamma_neg):
    """The same for one image, on Python numbers."""
    z = [
        x - 20 * (0.5 * abs(e) * d + (0.1 if j == y else 0))
        for j, (x, e, d) in enumerate(zip(logits, noise, delta, strict=True))
    ]
    total = sum(math.exp(v) for v in z)
    loss = 0.0
    for j, v in enumerate(z):
        p = math.exp(v) / total
        weight = (1 - p) ** gamma_pos if j == y else p**gamma_neg
        loss -= ((0.9 if j == y else 0.0) + 0.1 / len(z)) * weight * math.log(p)
    return loss


def batch(rows=16, *, dtype=torch.float64):
    """Logits of cosines in (-0.6, 0.6), labels, clamped noise."""
    generator = torch.Generator().manual_seed(0)
    logits = 20 * (1.2 * torch.rand(rows, len(COUNTS), generator=generator, dtype=torch.float64) - 0.6)
    target = torch.randint(len(COUNTS), (rows,), generator=generator)
    noise = (torch.randn(rows, len(COUNTS), generator=generator, dtype=torch.float64) / 3).clamp(-1, 1)
    return logits.to(dtype), target, noise


def with_gradient(function, logits):
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf)
    loss.sum().backward()
    return loss.detach(), leaf.grad


# --- the recorded cases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["balanced_branch", "instance_branch", "no_margin"])
@pytest.mark.parametrize("as_module", [False, True])
def test_golden(case, as_module):
    with safe_open(GOLDEN / f"agcl_{case}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    config["noise_scale"] = config.pop("noise_mul")
    cosine = golden["cosine"].clone().requires_grad_()
    logits = config["scale"] * cosine
    if as_module:  # half() must not round what the loss is computed from
        loss = AGCLLoss(golden["class_counts"], **config).half()(logits, golden["target"], golden["noise"])
    else:
        loss = agcl_loss(logits, golden["target"], golden["class_counts"].tolist(), golden["noise"], **config)
    loss.backward()
    assert abs(loss - golden["loss"]) < 1e-9
    torch.testing.assert_close(cosine.grad, golden["grad.cosine"], rtol=0, atol=1e-9)


# --- against the plain formula --------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [COUNTS, [7] * 6, [2**40, 2**40 - 1, 5, 5, 3, 1], [1000, 999, 998, 1000, 997, 999]])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("branch", BRANCHES)
def test_float64_equals_autograd_of_the_plain_formula(branch, normalize, counts):
    logits, target, noise = batch()
    delta = plain_delta(counts, normalize)
    nu = 0.5 if normalize else 0.05  # a raw delta of 27 would push p below what the plain formula can hold
    expected = with_gradient(lambda x: plain_agcl(x, target, delta, noise, nu=nu, **BRANCHES[branch]), logits)
    keywords = {"normalize": normalize, "noise_scale": nu, "reduction": "none", **BRANCHES[branch]}
    actual = with_gradient(lambda x: agcl_loss(x, target, counts, noise, **keywords), logits)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == torch.float64
        # near-equal counts: the difference of logarithms in the oracle is itself good to 1e-12 only
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("counts", [COUNTS, [99_999, 99_998, 99_997, 99_996, 99_995, 99_999]])
@pytest.mark.parametrize("branch", BRANCHES)
def test_low_precision_loses_only_the_rounding_of_logits_and_gradient(branch, autocast, dtype, counts):
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
def test_a_target_whose_probability_rounds_to_one_keeps_its_gradient(dtype):
    """Trap 5: a cosine gap of 1.1 at C = 100, where 1 - p_y is 0 in float32 and its square root has no gradient."""
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


def test_a_hopeless_target_has_the_gradient_of_cross_entropy():
    logits = torch.tensor([[-1e4, 1e4, -3e4]])  # p_y = 0, so w_y = 1 and d w_y = 0
    loss, gradient = with_gradient(
        lambda x: agcl_loss(x, torch.tensor([0]), [3, 2, 1], **PLAIN_CE | {"gamma_pos": 0.5}), logits
    )
    assert loss == 2e4
    assert torch.equal(gradient, torch.tensor([[-1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_its_own_terms_it_is_cross_entropy(reduction):
    logits, target, noise = batch()
    expected = with_gradient(lambda x: F.cross_entropy(x, target, reduction=reduction), logits)
    for draw in (None, noise):
        loss = AGCLLoss(COUNTS, reduction=reduction, **PLAIN_CE)
        actual = with_gradient(lambda x, loss=loss, draw=draw: loss(x, target, draw), logits)
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_an_exponent_of_zero_leaves_label_smoothing_alone():
    logits, target, _ = batch()
    expected = F.cross_entropy(logits, target, label_smoothing=0.3)
    actual = agcl_loss(logits, target, COUNTS, **PLAIN_CE | {"label_smoothing": 0.3})
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


def test_reductions_are_those_of_the_rows():
    logits, target, noise = batch()
    rows, mean, total = (agcl_loss(logits, target, COUNTS, noise, reduction=r) for r in ("none", "mean", "sum"))
    assert rows.shape == (16,)
    torch.testing.assert_close(mean, rows.mean())
    torch.testing.assert_close(total, rows.sum())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_any_integer_labels(dtype):
    logits, target, noise = batch()
    assert torch.equal(agcl_loss(logits, target.to(dtype), COUNTS, noise), agcl_loss(logits, target, COUNTS, noise))


# --- properties -----------------------------------------------------------------------------------------------------

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
def test_order_of_images_and_of_classes_does_not_matter(order, classes):
    logits, target, noise = batch(8)
    keywords = {"reduction": "none", **BRANCHES["instance"]}
    expected = agcl_loss(logits, target, COUNTS, noise, **keywords)
    torch.testing.assert_close(
        agcl_loss(logits[order], target[order], COUNTS, noise[order], **keywords), expected[order], rtol=1e-12, atol=0
    )
    counts, place = [COUNTS[j] for j in classes], torch.tensor([classes.index(j) for j in range(len(COUNTS))])
    moved = agcl_loss(logits[:, classes], place[target], counts, noise[:, classes], **keywords)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)


def test_equal_counts_ignore_the_noise():
    logits, target, noise = batch()
    expected = plain_agcl(logits, target, torch.zeros(6, dtype=torch.float64), torch.zeros_like(noise)).mean()
    torch.testing.assert_close(agcl_loss(logits, target, [9] * 6, noise), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(AGCLLoss([9] * 6)(logits, target), expected, rtol=1e-12, atol=0)


# --- noise ----------------------------------------------------------------------------------------------------------


def drawn_noise(counts, rows=20_000):
    """|noise| of the rare classes (the smallest, if there are two), read back from the loss of a batch of zeros.

    With the common class as target and a large scale, odds = scale * noise_scale * min |noise|.
    """
    loss = AGCLLoss(counts, scale=200.0, reduction="none", **PLAIN_CE | {"noise_scale": 0.5})
    target = torch.zeros(rows, dtype=torch.long)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = loss(torch.zeros(rows, len(counts), dtype=torch.float64), target)
    return (-values.expm1().log() / 100).numpy()  # the inverse of loss = log(1 + exp(-odds))


def test_training_noise_is_a_clamped_gaussian_of_standard_deviation_a_third():
    noise = drawn_noise([100, 1])
    assert noise.max() <= 1 + 1e-9
    clamped = (noise > 1 - 1e-9).mean()
    assert abs(clamped - 2 * scipy.stats.norm.sf(3)) < 0.0015  # 4 standard errors
    inside = noise[noise < 1 - 1e-9] * 3
    test = scipy.stats.kstest(inside, lambda x: scipy.stats.halfnorm.cdf(x) / scipy.stats.halfnorm.cdf(3))
    assert test.pvalue > 0.001


def test_every_logit_has_its_own_draw():
    smaller_of_two = scipy.stats.halfnorm.ppf(1 - 0.5**0.5) / 3  # its median, were the two independent
    median = sorted(drawn_noise([100, 1, 1]))[10_000]
    assert median == pytest.approx(smaller_of_two, rel=0.1)


def test_eval_has_no_noise_and_draws_no_random_number():
    logits, target, noise = batch()
    loss = AGCLLoss(COUNTS)
    before = torch.get_rng_state()
    quiet = loss.eval()(logits, target)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(quiet, agcl_loss(logits, target, COUNTS))
    torch.testing.assert_close(quiet, plain_agcl(logits, target, plain_delta(COUNTS), 0 * noise).mean())
    assert loss.train()(logits, target) != loss(logits, target)


def test_a_given_noise_is_used_in_both_modes():
    logits, target, noise = batch()
    loss = AGCLLoss(COUNTS)
    expected = plain_agcl(logits, target, plain_delta(COUNTS), noise).mean()
    before = torch.get_rng_state()
    for mode in (True, False):
        torch.testing.assert_close(loss.train(mode)(logits, target, noise), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_generator_makes_a_draw_repeatable():
    logits, target, _ = batch()
    loss = AGCLLoss(COUNTS)
    with torch.random.fork_rng():
        values = [torch.manual_seed(seed) and loss(logits, target) for seed in (3, 3, 4)]
    assert values[0] == values[1] != values[2]


# --- the whole objective --------------------------------------------------------------------------------------------


def loop_objective(output, target, epoch, noise, *, epochs, eta, match_weight):
    """method.md sections 4 to 6, one image after the other."""
    delta, half = plain_delta(COUNTS).tolist(), len(target) // 2
    total = 0.0
    for row, (x, sims, y, e) in enumerate(
        zip(output.logits.tolist(), output.similarity.tolist(), target.tolist(), noise.tolist(), strict=True)
    ):
        is_instance = row < half
        beta = eta * (epochs - epoch) / epochs if is_instance else 1.0
        gammas = BRANCHES["instance" if is_instance else "balanced"]
        match = 1 - sum(sims) / len(sims) if sims else 0.0
        total += beta * (scalar_agcl(x, y, delta, e, **gammas) + match_weight * match) / half
    return total


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize(("epoch", "eta", "match_weight"), [(0, 0.5, 1.0), (7, 0.5, 1.0), (2.25, 0.8, 0.3), (10, 2, 0)])
def test_lpt_loss_equals_a_loop(k, epoch, eta, match_weight):
    logits, target, noise = batch(10)
    similarity = torch.rand(10, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output, keywords = Output(logits, similarity), {"epochs": 10, "eta": eta, "match_weight": match_weight}
    loss = LPTLoss(COUNTS, **keywords)
    actual = loss(output, target, epoch, noise)
    expected = loop_objective(output, target, epoch, noise, **keywords)
    assert actual.shape == ()
    assert actual.item() == pytest.approx(expected, rel=1e-12)
    terms = loss.terms(output, target, epoch, noise)
    assert list(terms) == ["balanced_agcl", "balanced_match", "instance_agcl", "instance_match"]
    assert sum(terms.values()).item() == pytest.approx(expected, rel=1e-12)


def test_match_gradient_is_a_mean_over_k_and_images():
    """Traps 2 and 3: -beta / (B k) for each similarity, whatever k."""
    logits, target, _ = batch(8)
    for k in (1, 2, 5):
        similarity = torch.zeros(8, k, dtype=torch.bfloat16).requires_grad_()
        LPTLoss(COUNTS, epochs=4)(Output(logits, similarity), target, epoch=2).backward()
        expected = torch.tensor([0.25] * 4 + [1.0] * 4)[:, None].expand(8, k) / (4 * k)
        torch.testing.assert_close(similarity.grad.float(), -expected, rtol=1e-2, atol=0)


def test_match_term_of_bfloat16_similarities_is_a_float32_mean():
    logits, target, _ = batch(64, dtype=torch.bfloat16)
    similarity = torch.rand(64, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    match = LPTLoss(COUNTS, epochs=4).terms(Output(logits, similarity), target, epoch=0)["balanced_match"]
    assert match.dtype == torch.float32
    assert match.item() == pytest.approx(1 - similarity[32:].double().mean().item(), rel=1e-6)


def test_lpt_loss_settings_reach_the_branches():
    given_settings = {"scale": 16.0, "margin": 0.2, "noise_scale": 0.3, "label_smoothing": 0.05, "normalize": False}
    loss = LPTLoss(
        COUNTS, 5, gamma_pos=0.1, gamma_neg=2, instance_gamma_pos=0.3, instance_gamma_neg=6, **given_settings
    )
    logits, target, noise = batch(8)
    plain = {"s": 16.0, "mu": 0.2, "nu": 0.3, "a": 0.05}
    delta = plain_delta(COUNTS, normalize=False)
    rows = [
        plain_agcl(logits, target, delta, noise, gamma_pos=0.3, gamma_neg=6, **plain)[:4].mean() * 0.5,
        plain_agcl(logits, target, delta, noise, gamma_pos=0.1, gamma_neg=2, **plain)[4:].mean(),
    ]
    actual = loss(Output(logits, torch.zeros(8, 0)), target, 0, noise)
    torch.testing.assert_close(actual, sum(rows), rtol=1e-12, atol=0)


def test_lpt_loss_draws_noise_in_training_only():
    logits, target, noise = batch(8)
    output = Output(logits, torch.zeros(8, 0))
    loss = LPTLoss(COUNTS, 5)
    assert loss(output, target, 0) != loss(output, target, 0)
    loss.eval()
    torch.testing.assert_close(loss(output, target, 0), loss(output, target, 0, torch.zeros_like(noise)))


# --- standard torch habits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(training):
    torch._dynamo.reset()
    logits, target, noise = batch(8, dtype=torch.float32)
    loss = AGCLLoss(COUNTS, gamma_pos=0.5).train(training)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, target, noise), loss(logits, target, noise))
    assert compiled(logits, target).isfinite()

    output = Output(logits, torch.rand(8, 2))
    objective = LPTLoss(COUNTS, 10).train(training)
    compiled = torch.compile(objective, fullgraph=True, backend="eager")
    for epoch in (0, 1, 2, 3, 2.5):
        torch.testing.assert_close(compiled(output, target, epoch, noise), objective(output, target, epoch, noise))
    assert compiled(output, target, 0).isfinite()
    assert compiled(Output(logits, torch.rand(8, 0)), target, 0).isfinite()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies_and_state(clone):
    logits, target, noise = batch(8)
    output = Output(logits, torch.rand(8, 2))
    loss = LPTLoss(torch.tensor(COUNTS), 10, eta=0.7, margin=0.2)
    assert torch.equal(clone(loss)(output, target, 3, noise), loss(output, target, 3, noise))
    assert not loss.state_dict()
    assert not list(loss.parameters())
    assert {buffer.device.type for buffer in loss.to("meta").buffers()} == {"meta"}


def test_counts_are_copied_and_shown():
    counts = torch.tensor(COUNTS)
    loss = AGCLLoss(counts, margin=0.25)
    counts.zero_()
    assert loss.class_counts.tolist() == COUNTS
    assert AGCLLoss([70_001, 3]).half().class_counts.tolist() == [70_001, 3]
    assert "num_classes=6, scale=20.0, margin=0.25" in repr(loss)


def test_whole_counts_of_any_kind():
    logits, target, noise = batch()
    expected = agcl_loss(logits, target, COUNTS, noise)
    tensor = torch.tensor(COUNTS)
    for counts in (tuple(COUNTS), tensor, tensor.to(torch.uint8), tensor.double(), tensor.numpy(), [*COUNTS[:-1], 1.0]):
        assert torch.equal(agcl_loss(logits, target, counts, noise), expected)


# --- one pass over rows: blocks, branches, second derivatives, devices ------------------------------------------------


@pytest.mark.parametrize(
    "gammas", [(0.0, 4.0), (0.5, 8.0), (1.0, 1.0), (0.3, 2.7), (2.0, 0.0), (0.0, 11.0), (1.0, 40.0)]
)
@pytest.mark.parametrize("rows", [7, 16])
def test_blocks_and_any_exponents_equal_the_plain_formula(gammas, rows, monkeypatch):
    """Blocks of two rows, whole and cut; integer, fractional and large exponents."""
    monkeypatch.setattr(rows_module, "_BLOCK", 2 * len(COUNTS))
    gamma_pos, gamma_neg = gammas
    logits, target, noise = batch(rows)
    logits = logits / 4  # so that no negative weight is below what counts as 0
    keywords = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg}
    expected = with_gradient(lambda x: plain_agcl(x, target, plain_delta(COUNTS), noise, s=5.0, **keywords), logits)
    actual = with_gradient(
        lambda x: agcl_loss(x, target, COUNTS, noise, scale=5.0, reduction="none", **keywords), logits
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gammas", [((0.5, 0.0), (8.0, 4.0)), ((0.5, 0.5), (4.0, 4.0)), ((0.0, 2.0), (0.0, 1.5))])
@pytest.mark.parametrize("gradient", [True, False])
def test_exponents_as_columns_equal_those_as_numbers(gammas, gradient, monkeypatch):
    """What runs on a device: all rows at once, with a column of exponents."""
    logits, target, noise = batch(8)
    branches = rows_module.Branches(*gammas, 20.0, 0.1, 0.5, 0.1, plain_delta(COUNTS))
    logits.requires_grad_(gradient)
    upstream = torch.arange(1.0, 9.0, dtype=torch.float64)

    def answers():
        loss = rows_module.agcl_rows(logits, target, noise, branches)
        return (loss, *torch.autograd.grad(loss, logits, upstream)) if gradient else (loss,)

    by_numbers = answers()
    columns = [rows_module._column(values, logits, torch.float64) for values in gammas]
    monkeypatch.setattr(rows_module, "_blocks", lambda *args: iter([(slice(0, 8), *columns)]))
    torch.testing.assert_close(answers(), by_numbers, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e6, 1e17])
@pytest.mark.parametrize("branch", BRANCHES)
def test_definition_and_closed_form_agree_for_extreme_logits(branch, size):
    generator = torch.Generator().manual_seed(0)
    logits = size * torch.randn(64, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(6, (64,), generator=generator)
    gammas = ((value,) for value in BRANCHES[branch].values())
    branches = rows_module.Branches(*gammas, 20.0, 0.1, 0.5, 0.1, plain_delta(COUNTS))
    actual = with_gradient(lambda x: rows_module.agcl_rows(x, target, rows_module.Noise.NONE, branches), logits)
    expected = with_gradient(lambda x: rows_module._definition(x, target, rows_module.Noise.NONE, branches), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("branch", BRANCHES)
def test_first_and_second_derivatives(branch):
    logits, target, noise = batch(5)
    logits = (logits / 4).requires_grad_()
    loss = AGCLLoss(COUNTS, scale=5.0, **BRANCHES[branch])
    assert torch.autograd.gradcheck(lambda x: loss(x, target, noise), logits)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, target, noise), logits)
    expected = torch.autograd.functional.hessian(
        lambda x: plain_agcl(x, target, plain_delta(COUNTS), noise, s=5.0, **BRANCHES[branch]).mean(), logits
    )
    actual = torch.autograd.functional.hessian(lambda x: loss(x, target, noise), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_second_derivative_sees_the_noise_that_was_drawn(monkeypatch):
    """Against differences of first derivatives under the same seed; the batch is cut into blocks of two rows."""
    monkeypatch.setattr(rows_module, "_BLOCK", 2 * len(COUNTS))
    logits, target, _ = batch(5)
    logits = (logits / 4).requires_grad_()
    direction = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6)
    loss = AGCLLoss(COUNTS, scale=5.0, **BRANCHES["instance"])

    def slope(x, create_graph=False):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return torch.autograd.grad(loss(x, target), x, create_graph=create_graph)[0]

    first = slope(logits, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), logits)
    step = 1e-5 * direction
    expected = (slope(logits + step) - slope(logits - step)) / 2e-5
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-9)
    quiet = torch.autograd.grad(loss.eval()(logits, target), logits)[0]
    assert not torch.allclose(first, quiet)


def test_torch_func():
    logits, target, noise = batch(6)
    loss = AGCLLoss(COUNTS, gamma_pos=0.5, reduction="sum")
    _, expected = with_gradient(lambda x: loss(x, target, noise), logits)
    torch.testing.assert_close(torch.func.grad(lambda x: loss(x, target, noise))(logits), expected)
    per_row = torch.func.vmap(torch.func.grad(lambda x, y, e: loss(x[None], y[None], e[None])))
    torch.testing.assert_close(per_row(logits, target, noise), expected)
    _, slope = torch.func.jvp(lambda x: loss(x, target, noise), (logits,), (noise,))
    torch.testing.assert_close(slope, (expected * noise).sum())
    drawn = torch.func.vmap(lambda x: loss(x, target), randomness="different")(torch.stack([logits, logits]))
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [lambda: AGCLLoss(COUNTS), lambda: LPTLoss(COUNTS, 3)])
def test_no_host_read_forward_or_backward(make, training, monkeypatch):
    """Neither where the labels' values are taken to be on a device, nor on "meta", where every read is an error."""
    criterion = make().train(training)
    for device in ("cpu", "meta"):
        criterion = criterion.to(device)
        monkeypatch.setattr("lpt_peft.losses.checks._values_are_free", lambda tensor: False)
        logits = torch.randn(8, 6, device=device, requires_grad=True)
        similarity = torch.rand(8, 2, device=device, requires_grad=True)
        target = torch.randint(6, (8,), device=device)
        given = Output(logits, similarity) if isinstance(criterion, LPTLoss) else logits
        with count_host_reads() as reads:
            if isinstance(criterion, LPTLoss):
                criterion.set_epoch(1)
            criterion(given, target).backward()
            if isinstance(criterion, LPTLoss):
                criterion.terms(given, target)
        assert reads == [], reads.locations
        assert logits.grad.shape == logits.shape


def test_labels_are_read_on_a_cpu_only():
    logits, target, _ = batch(8)
    loss = AGCLLoss(COUNTS)
    with count_host_reads() as reads:
        loss(logits, target)
    assert reads == ["aten._local_scalar_dense"]
    loss.to("meta")(logits.to("meta"), target.to("meta"))  # reading a value there would raise


def test_a_label_out_of_range_that_is_not_checked_fails_in_torch(monkeypatch):
    """On a CUDA device the same index fails torch's assertion."""
    monkeypatch.setattr("lpt_peft.losses.checks._values_are_free", lambda tensor: False)
    for label in (-1, 6):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            AGCLLoss(COUNTS)(torch.zeros(1, 6, requires_grad=True), torch.tensor([label]))


# --- settings that change, and the epoch ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"normalize": False}, {"margin": 0.3}, {"class_counts": [3, 3, 2, 50, 7, 1]}, {"gamma_neg": 2.0}]
)
def test_assigned_settings_count_at_once(change):
    logits, target, noise = batch(8)
    output = Output(logits, torch.zeros(8, 0))
    for loss, inputs in (
        (AGCLLoss(COUNTS, noise_scale=0.05), (logits, target, noise)),
        (LPTLoss(COUNTS, 3, noise_scale=0.05), (output, target, 1, noise)),
    ):
        counts = change.get("class_counts", COUNTS)
        settings = {name: value for name, value in change.items() if name != "class_counts"}
        epochs = (3,) if isinstance(loss, LPTLoss) else ()
        expected = type(loss)(counts, *epochs, noise_scale=0.05, **settings)
        before = loss(*inputs)
        for name, value in change.items():
            setattr(loss, name, value)
        assert loss(*inputs) == expected(*inputs) != before
        single = (
            [logits.float(), target, noise.float()]
            if isinstance(loss, AGCLLoss)
            else [Output(logits.float(), torch.zeros(8, 0)), target, 1, noise.float()]
        )
        assert loss(*single) == expected(*single), "float32 reads delta from a buffer"


def test_assigned_settings_are_checked():
    loss = LPTLoss(COUNTS, 3)
    for name, value in {"margin": -1, "epochs": 0, "eta": math.nan, "normalize": 1, "instance_gamma_neg": "8"}.items():
        before = getattr(loss, name)
        with pytest.raises(ConfigError, match=f"{name}="):
            setattr(loss, name, value)
        assert getattr(loss, name) == before
    with pytest.raises(InputError, match=r"class_counts\[0\]=0 "):
        loss.class_counts = [0, 1]
    with pytest.raises(ConfigError, match="reduction='avg'"):
        AGCLLoss(COUNTS).reduction = "avg"


def test_half_and_double_leave_counts_and_delta_exact():
    logits, target, noise = batch(8, dtype=torch.float32)
    expected = AGCLLoss(COUNTS)(logits, target, noise)
    for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        assert convert(AGCLLoss(COUNTS))(logits, target, noise) == expected


def test_set_epoch_is_what_a_call_without_an_epoch_uses():
    logits, target, noise = batch(8)
    output = Output(logits, torch.rand(8, 2))
    loss = LPTLoss(COUNTS, epochs=4)
    assert loss.epoch == 0
    for epoch in (0, 1, 2.5, 4):
        loss.set_epoch(epoch)
        assert loss.epoch == epoch
        assert f"LPTLoss(epoch={epoch}, num_classes=6, epochs=4" in repr(loss)
        assert loss(output, target, noise=noise) == loss(output, target, epoch, noise)
        assert loss.terms(output, target, noise=noise) == loss.terms(output, target, epoch, noise)
    assert loss(output, target, 1, noise) == LPTLoss(COUNTS, 4)(output, target, 1, noise)
    assert loss.epoch == 4, "an epoch given to a call counts for that call"
    assert copy.deepcopy(loss).epoch == 4
    for epoch in (-1, 4.5, math.nan):
        with pytest.raises(InputError, match=r"epoch=.* must be from 0 to epochs=4"):
            loss.set_epoch(epoch)
    assert loss.epoch == 4


def test_set_epoch_compiles_once():
    torch._dynamo.reset()
    logits, target, _ = batch(8, dtype=torch.float32)
    output = Output(logits, torch.rand(8, 2))
    loss, counter = LPTLoss(COUNTS, epochs=20).eval(), CompileCounter()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for epoch in range(20):
        loss.set_epoch(epoch)
        torch.testing.assert_close(compiled(output, target), loss(output, target))
    loss.eta = 0.9
    torch.testing.assert_close(compiled(output, target), loss(output, target))
    assert counter.frame_count <= 2, "once, and once more for the changed setting"


def test_benchmark_runs(capsys):
    runpy.run_path(str(ROOT / "examples/benchmarks/losses.py"))["main"](rows=4, classes=10, rounds=2)
    shown = capsys.readouterr().out
    for name in ("cross_entropy", "AGCLLoss, train", "AGCLLoss, eval", "LPTLoss, train", "the noise alone"):
        assert name in shown


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([5, 0, 3], r"class_counts\[1\]=0 .*at least 1.*leave a class without training images out"),
        ([5, 3, -2], r"class_counts\[2\]=-2 "),
        ([5.0, 2.5], r"class_counts\[1\]=2.5 .*integer"),
        ([math.nan, 2.0], r"class_counts\[0\]=nan "),
        ([2.0, math.inf], r"class_counts\[1\]=inf "),
        ([1e30, 2.0], r"class_counts\[0\]=1.*e\+30 "),
        ([], "class_counts must be one integer per class.*bincount"),
        ([[1, 2]], r"shape \(1, 2\).*bincount"),
        (7, r"class_counts must be .* shape \(\)"),
        ([True, True], "torch.bool"),
        ([1j, 2], "complex"),
        ([1, None], "class_counts must be one integer per class, not"),
        ("many", "class_counts must be one integer per class, not 'many'"),
        ({0: 5, 1: 3}, "class_counts must be one integer per class, not"),
        ([[1], [2, 3]], "class_counts must be one integer per class, not"),
        ([2**70], "class_counts must be one integer per class, not"),
    ],
)
def test_class_counts_are_refused_by_name(counts, words):
    logits, target = torch.zeros(1, 2), torch.tensor([0])
    for call in (lambda: AGCLLoss(counts), lambda: LPTLoss(counts, 1), lambda: agcl_loss(logits, target, counts)):
        with pytest.raises(InputError, match=words):
            call()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": torch.tensor([0, 1, 6, 0])}, "label 6, but class_counts has the classes 0 to 5"),
        ({"target": torch.tensor([0, -100, 2, 0])}, "label -100.*drop the rows"),
        ({"target": torch.zeros(4)}, r"integer dtype, not torch.float32.*\.long\(\)"),
        ({"target": torch.full((4, 6), 1 / 6)}, r"torch.float32 of shape \(4, 6\), as Mixup.*cross_entropy"),
        ({"target": torch.zeros(4, dtype=torch.bool)}, "not torch.bool"),
        ({"noise": torch.zeros(4, 6, requires_grad=True)}, r"noise requires a gradient.*noise.detach\(\)"),
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target must have shape \(B,\) = \(4,\), not \(3,\)"),
        ({"target": torch.zeros(4, 6, dtype=torch.long)}, r"target must have shape .* not \(4, 6\)"),
        ({"target": torch.tensor(1)}, r"target must have shape .* not \(\)"),
        ({"logits": torch.zeros(4, 5)}, "logits have 5 columns but class_counts 6 classes"),
        ({"logits": torch.zeros(6)}, r"logits must be floating \(B, C\) .* shape \(6,\)"),
        ({"logits": torch.zeros(4, 6, 2)}, r"logits must be floating .* shape \(4, 6, 2\)"),
        ({"logits": torch.zeros(4, 6, dtype=torch.long)}, "logits must be floating .* torch.int64"),
        ({"logits": torch.zeros(0, 6), "target": torch.zeros(0, dtype=torch.long)}, "with B > 0"),
        ({"noise": torch.zeros(6)}, r"noise must have the shape of logits, \(4, 6\), not \(6,\)"),
        ({"noise": torch.zeros(4, 1)}, r"noise must have the shape of logits, \(4, 6\), not \(4, 1\)"),
    ],
)
def test_batches_are_refused_by_name(change, words):
    call = {"logits": torch.zeros(4, 6), "target": torch.zeros(4, dtype=torch.long), "noise": None, **change}
    with pytest.raises(InputError, match=words):
        agcl_loss(**call, class_counts=COUNTS)
    with pytest.raises(InputError, match=words):
        AGCLLoss(COUNTS)(**call)
    output = Output(call.pop("logits"), torch.zeros(4, 2))
    with pytest.raises(InputError, match=words):
        LPTLoss(COUNTS, 3)(output, epoch=0, **call)


@pytest.mark.parametrize("name", ["scale", "margin", "noise_scale", "gamma_pos", "gamma_neg", "label_smoothing"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "0.1", True, None])
def test_settings_are_refused_by_name(name, value):
    logits, target, _ = batch(2)
    for call in (
        lambda **keywords: AGCLLoss(COUNTS, **keywords),
        lambda **keywords: LPTLoss(COUNTS, 3, **keywords),
        lambda **keywords: agcl_loss(logits, target, COUNTS, **keywords),
    ):
        with pytest.raises(ConfigError, match=f"{name}=.* must be a finite number"):
            call(**{name: value})


def test_settings_limits():
    with pytest.raises(ConfigError, match=r"scale=0 .*greater than 0"):
        AGCLLoss(COUNTS, scale=0)
    with pytest.raises(ConfigError, match=r"label_smoothing=1.1 .*from 0 to 1"):
        AGCLLoss(COUNTS, label_smoothing=1.1)
    with pytest.raises(ConfigError, match="reduction='avg' must be 'mean', 'sum' or 'none'"):
        AGCLLoss(COUNTS, reduction="avg")
    with pytest.raises(ConfigError, match="normalize='no' must be True or False"):
        AGCLLoss(COUNTS, normalize="no")
    for name in ("instance_gamma_pos", "instance_gamma_neg", "eta", "match_weight"):
        with pytest.raises(ConfigError, match="=-1 must be a finite number"):
            LPTLoss(COUNTS, 3, **{name: -1})
    for epochs in (0, -3, math.nan, None):
        with pytest.raises(ConfigError, match=r"epochs=.*greater than 0"):
            LPTLoss(COUNTS, epochs)


def test_lpt_batches_are_refused_by_name():
    logits, target, _ = batch(6)
    similarity = torch.zeros(6, 2)
    loss = LPTLoss(COUNTS, epochs=10)
    with pytest.raises(InputError, match=r"5 rows.*two equal halves.*DualSampler"):
        loss(Output(logits[:5], similarity[:5]), target[:5], 0)
    for wrong in (similarity[:3], similarity[:, 0], torch.tensor(0.5)):
        with pytest.raises(InputError, match=r"output.similarity must have shape \(6, k\)"):
            loss(Output(logits, wrong), target, 0)
    with pytest.raises(InputError, match="return_output=True"):
        loss(logits, target, 0)
    for epoch in (-1, 10.5, math.nan):
        with pytest.raises(InputError, match=r"epoch=.* must be from 0 to epochs=10"):
            loss(Output(logits, similarity), target, epoch)


def test_a_refused_setting_leaves_the_loss_as_it_was():
    criterion = LPTLoss([3, 4, 50], epochs=8)
    criterion.set_epoch(6)
    with pytest.raises(InputError, match="epoch=6 must be from 0 to epochs=4"):
        criterion.epochs = 4
    assert criterion.epochs == 8
    criterion.set_epoch(7)
    assert criterion.instance_weight(7) == pytest.approx(0.5 / 8)


def test_a_loss_made_in_inference_mode_can_be_used_outside():
    with torch.inference_mode():
        criterion = LPTLoss([3, 4, 50], epochs=8)
    criterion.set_epoch(2)
    assert criterion.epoch == 2


@pytest.mark.parametrize(
    "output",
    [(torch.zeros(2, 3),), SimpleNamespace(logits=torch.zeros(2, 3)), SimpleNamespace(logits=None, similarity=None)],
)
def test_an_output_without_logits_and_similarity_is_named(output):
    with pytest.raises(InputError, match=f"{type(output).__name__} without the tensors logits and similarity"):
        LPTLoss([3, 4, 50], epochs=8)(output, torch.tensor([0, 1]))


def test_agcl_names_an_output_that_is_no_tensor():
    with pytest.raises(InputError, match=r"not a SimpleNamespace: give output\.logits"):
        AGCLLoss([3, 4, 50])(SimpleNamespace(logits=torch.zeros(2, 3)), torch.tensor([0, 1]))
