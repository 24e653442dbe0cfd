"""LPTLoss against a loop over images, its epoch and its errors."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lpt_peft.errors import InputError
from lpt_peft.losses import LPTLoss
from tests.losses.oracle import BRANCHES, COUNTS, Output, batch, plain_agcl, plain_delta, scalar_agcl


def loop_objective(output, target, epoch, noise, *, epochs, eta, match_weight):
    """Objective of docs/explanation/method.md, image by image."""
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
def test_matches_loop_over_images(k, epoch, eta, match_weight):
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
    """The gradient of each similarity is -beta / (B k) for every k."""
    logits, target, _ = batch(8)
    for k in (1, 2, 5):
        similarity = torch.zeros(8, k, dtype=torch.bfloat16).requires_grad_()
        LPTLoss(COUNTS, epochs=4)(Output(logits, similarity), target, epoch=2).backward()
        expected = torch.tensor([0.25] * 4 + [1.0] * 4)[:, None].expand(8, k) / (4 * k)
        torch.testing.assert_close(similarity.grad.float(), -expected, rtol=1e-2, atol=0)


def test_match_term_of_bfloat16_similarities_is_float32():
    logits, target, _ = batch(64, dtype=torch.bfloat16)
    similarity = torch.rand(64, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    match = LPTLoss(COUNTS, epochs=4).terms(Output(logits, similarity), target, epoch=0)["balanced_match"]
    assert match.dtype == torch.float32
    assert match.item() == pytest.approx(1 - similarity[32:].double().mean().item(), rel=1e-6)


def test_settings_reach_the_branches():
    settings = {"scale": 16.0, "margin": 0.2, "noise_scale": 0.3, "label_smoothing": 0.05, "normalize": False}
    loss = LPTLoss(COUNTS, 5, gamma_pos=0.1, gamma_neg=2, instance_gamma_pos=0.3, instance_gamma_neg=6, **settings)
    logits, target, noise = batch(8)
    plain = {"s": 16.0, "mu": 0.2, "nu": 0.3, "a": 0.05}
    delta = plain_delta(COUNTS, normalize=False)
    rows = [
        plain_agcl(logits, target, delta, noise, gamma_pos=0.3, gamma_neg=6, **plain)[:4].mean() * 0.5,
        plain_agcl(logits, target, delta, noise, gamma_pos=0.1, gamma_neg=2, **plain)[4:].mean(),
    ]
    actual = loss(Output(logits, torch.zeros(8, 0)), target, 0, noise)
    torch.testing.assert_close(actual, sum(rows), rtol=1e-12, atol=0)


def test_noise_is_drawn_in_training_only():
    logits, target, noise = batch(8)
    output = Output(logits, torch.zeros(8, 0))
    loss = LPTLoss(COUNTS, 5)
    assert loss(output, target, 0) != loss(output, target, 0)
    loss.eval()
    torch.testing.assert_close(loss(output, target, 0), loss(output, target, 0, torch.zeros_like(noise)))


def test_set_epoch():
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
    assert loss.epoch == 4, "an epoch passed to a call applies to that call only"
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
    assert counter.frame_count <= 2, "one compilation, and another for the changed setting"


def test_invalid_batches():
    logits, target, _ = batch(6)
    similarity = torch.zeros(6, 2)
    loss = LPTLoss(COUNTS, epochs=10)
    with pytest.raises(InputError, match=r"5 rows cannot be split into two equal halves.*DualSampler"):
        loss(Output(logits[:5], similarity[:5]), target[:5], 0)
    for invalid in (similarity[:3], similarity[:, 0], torch.tensor(0.5)):
        with pytest.raises(InputError, match=r"output.similarity must have shape \(6, k\)"):
            loss(Output(logits, invalid), target, 0)
    with pytest.raises(InputError, match="return_output=True"):
        loss(logits, target, 0)
    for epoch in (-1, 10.5, math.nan):
        with pytest.raises(InputError, match=r"epoch=.* must be from 0 to epochs=10"):
            loss(Output(logits, similarity), target, epoch)


def test_invalid_setting_changes_nothing():
    criterion = LPTLoss([3, 4, 50], epochs=8)
    criterion.set_epoch(6)
    with pytest.raises(InputError, match="epoch=6 must be from 0 to epochs=4"):
        criterion.epochs = 4
    assert criterion.epochs == 8
    criterion.set_epoch(7)
    assert criterion.instance_weight(7) == pytest.approx(0.5 / 8)


def test_loss_created_in_inference_mode():
    with torch.inference_mode():
        criterion = LPTLoss([3, 4, 50], epochs=8)
    criterion.set_epoch(2)
    assert criterion.epoch == 2


@pytest.mark.parametrize(
    "output",
    [(torch.zeros(2, 3),), SimpleNamespace(logits=torch.zeros(2, 3)), SimpleNamespace(logits=None, similarity=None)],
)
def test_output_without_logits_and_similarity(output):
    with pytest.raises(InputError, match=f"{type(output).__name__} without the tensors logits and similarity"):
        LPTLoss([3, 4, 50], epochs=8)(output, torch.tensor([0, 1]))
