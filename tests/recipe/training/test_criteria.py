"""Losses named by the settings: their formulas, class frequencies of the batches, and deferred reweighting."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lpt_peft import DualSampler
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.losses import (
    agcl_loss,
    balanced_softmax_loss,
    class_balanced_loss,
    class_balanced_weights,
    focal_loss,
    ldam_loss,
    logit_adjusted_loss,
)
from lpt_peft.recipe import TrainSettings, train
from lpt_peft.recipe.summary import run_summary
from lpt_peft.recipe.train import make_accelerator
from lpt_peft.recipe.training.criteria import build_criterion
from tests.recipe.tiny import PHASE, SETTINGS, striped_data, tiny_adapter

COUNTS = [60, 12, 8]
LABELS = [label for label, count in enumerate(COUNTS) for _ in range(count)]
HEAD = SimpleNamespace(weight=torch.zeros(3, 4), scale=16.0)
DUAL_SHARES = torch.tensor([(n / 80 + 1 / 3) / 2 for n in COUNTS], dtype=torch.float64)
EPOCHS = 10


def criterion_of(**settings):
    criterion = build_criterion(TrainSettings(**settings), EPOCHS, LABELS, HEAD)
    return criterion.eval()


def rows(logits, epoch=0, groups=0, **settings):
    output = SimpleNamespace(logits=logits, similarity=torch.full((len(logits), groups), 0.25))
    return criterion_of(**settings)(output, torch.arange(len(logits)) % 3, epoch)


def logits_and_labels():
    generator = torch.Generator().manual_seed(0)
    return 4 * torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.arange(6) % 3


EXPECTED = {
    "agcl": lambda x, y: agcl_loss(x, y, COUNTS, scale=16.0),
    "cross_entropy": F.cross_entropy,
    "logit_adjusted": lambda x, y: logit_adjusted_loss(x, y, COUNTS),
    "balanced_softmax": lambda x, y: balanced_softmax_loss(x, y, COUNTS),
    "focal": focal_loss,
    "class_balanced": lambda x, y: class_balanced_loss(x, y, COUNTS),
    "ldam": lambda x, y: ldam_loss(x, y, COUNTS, scale=16.0),
}


@pytest.mark.parametrize("loss", EXPECTED)
def test_instance_sampling_uses_the_counts(loss):
    logits, labels = logits_and_labels()
    actual = rows(logits, loss=loss, sampling="instance")
    torch.testing.assert_close(actual, EXPECTED[loss](logits, labels), rtol=1e-6, atol=0)
    torch.testing.assert_close(rows(logits, groups=2, loss=loss, sampling="instance"), actual + 0.75)


@pytest.mark.parametrize("loss", ["agcl", "cross_entropy", "focal", "ldam"])
def test_losses_without_class_frequencies_do_not_depend_on_the_sampling(loss):
    logits, _ = logits_and_labels()
    assert rows(logits, loss=loss) == rows(logits, loss=loss, sampling="instance")


@pytest.mark.parametrize(("loss", "tau"), [("logit_adjusted", 1.0), ("logit_adjusted", 0.5), ("balanced_softmax", 1.0)])
def test_logit_adjustment_uses_the_frequencies_of_the_dual_batch(loss, tau):
    logits, labels = logits_and_labels()
    expected = F.cross_entropy(logits + tau * DUAL_SHARES.log(), labels)
    torch.testing.assert_close(rows(logits, loss=loss, tau=tau), expected)


def test_shares_of_a_dual_batch_are_those_that_the_sampler_draws():
    sampler = DualSampler(LABELS, batch_size=16)
    drawn = torch.zeros(3, dtype=torch.float64)
    for epoch in range(200):
        sampler.set_epoch(epoch)
        for batch in sampler:
            drawn += torch.bincount(torch.tensor(LABELS)[batch], minlength=3)
    torch.testing.assert_close(drawn / drawn.sum(), DUAL_SHARES, rtol=0.02, atol=0)


@pytest.mark.parametrize("loss", ["logit_adjusted", "balanced_softmax"])
@pytest.mark.parametrize("sampling", ["dual", "instance"])
def test_at_the_minimum_the_logits_are_those_of_balanced_classes(sampling, loss):
    """For images without information and labels with the frequencies of the batch, no class is preferred."""
    shares = DUAL_SHARES if sampling == "dual" else torch.tensor(COUNTS, dtype=torch.float64) / 80
    labels = torch.arange(3).repeat_interleave((480 * shares).round().long())
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    output = SimpleNamespace(logits=logits.expand(len(labels), 3), similarity=torch.zeros(len(labels), 0))
    (gradient,) = torch.autograd.grad(criterion_of(loss=loss, sampling=sampling)(output, labels, 0), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", [{"loss": "class_balanced"}, {"loss": "cross_entropy", "reweight_from": 0}])
def test_the_expected_weighted_loss_does_not_depend_on_the_sampling(settings):
    """share_j * weight_j is the same for dual and instance sampling; without the factor, rare classes count twice."""
    logits, _ = logits_and_labels()
    losses = [F.cross_entropy(logits[:1], torch.tensor([label])) for label in range(3)]
    shares = {"dual": DUAL_SHARES, "instance": torch.tensor(COUNTS, dtype=torch.float64) / 80}
    totals = {}
    for sampling, share in shares.items():
        output = SimpleNamespace(logits=logits[:1], similarity=torch.zeros(1, 0))
        criterion = criterion_of(sampling=sampling, **settings)
        totals[sampling] = sum(share[y] * criterion(output, torch.tensor([y]), 0) for y in range(3))
    expected = sum(n / 80 * w * x for n, w, x in zip(COUNTS, class_balanced_weights(COUNTS), losses, strict=True))
    torch.testing.assert_close(totals["dual"], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(totals["instance"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", ["agcl", "cross_entropy", "focal", "ldam"])
def test_deferred_reweighting_starts_at_its_epoch(loss):
    logits, labels = logits_and_labels()
    settings = {"loss": loss, "sampling": "instance", "reweight_from": 7}
    assert rows(logits, epoch=6, **settings) == rows(logits, loss=loss, sampling="instance")
    weights = class_balanced_weights(COUNTS).double()
    expected = [EXPECTED[loss](logits[[i]], labels[[i]]) * weights[labels[i]] for i in range(6)]
    for epoch in (7, 9):
        torch.testing.assert_close(rows(logits, epoch=epoch, **settings), sum(expected) / 6, rtol=1e-6, atol=0)


def test_reweighting_changes_training_from_its_epoch_on():
    dataset, labels = striped_data()
    phase = {"shared": replace(PHASE, epochs=3), "group": replace(PHASE, epochs=0)}
    plain = replace(SETTINGS, loss="cross_entropy", **phase)
    losses = [
        [record["loss"] for record in train(tiny_adapter(), dataset, labels, settings, progress=False)]
        for settings in (plain, replace(plain, reweight_from=2))
    ]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] != losses[1][2]


@pytest.mark.parametrize("loss", EXPECTED)
@pytest.mark.parametrize("sampling", ["dual", "instance"])
def test_every_loss_trains(loss, sampling):
    dataset, labels = striped_data()
    settings = replace(SETTINGS, loss=loss, sampling=sampling)
    history = train(tiny_adapter(), dataset, labels, settings, progress=False)
    assert len(history) == 8
    assert history[3]["loss"] < 0.7 * history[0]["loss"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "hinge"}, 'loss=\'hinge\' must be "lpt" or "agcl" or "cross_entropy" or'),
        ({"loss": "logit_adjusted", "tau": -1.0}, "tau=-1.0 must be at least 0 and finite"),
        ({"loss": "focal", "tau": 0.5}, 'tau=0.5 needs loss="logit_adjusted"; loss="focal" does not use it'),
        ({"loss": "focal", "reweight_from": -1}, "reweight_from=-1 must be None or at least 0"),
        (
            {"loss": "lpt", "reweight_from": 3},
            'reweight_from=3 cannot be used with loss="lpt", which already',
        ),
        ({"loss": "logit_adjusted", "reweight_from": 3}, 'loss="logit_adjusted", which already corrects'),
        ({"loss": "balanced_softmax", "reweight_from": 3}, 'loss="balanced_softmax", which already corrects'),
        ({"loss": "class_balanced", "reweight_from": 3}, "which has these weights from the start: leave it out"),
        ({"loss": "ldam", "reweight_from": 40}, "reweight_from=40 is never reached: .* the longest has 40"),
    ],
)
def test_settings_refuse(settings, words):
    with pytest.raises(ConfigError, match=words):
        TrainSettings(**settings)


@pytest.mark.parametrize("loss", ["logit_adjusted", "balanced_softmax", "class_balanced", "ldam"])
def test_a_class_without_images_is_refused_by_losses_with_counts(loss):
    dataset, labels = striped_data()
    settings = replace(SETTINGS, loss=loss)
    with pytest.raises(InputError, match=f'class 2. loss="{loss}" needs images of every class'):
        train(tiny_adapter(), dataset, [min(label, 1) for label in labels], settings, progress=False)


def test_a_class_without_images_is_refused_by_reweighting():
    dataset, labels = striped_data()
    empty = [min(label, 1) for label in labels]
    settings = replace(SETTINGS, loss="cross_entropy", reweight_from=1)
    with pytest.raises(InputError, match=r'or use loss="cross_entropy" or "focal" without reweight_from\.'):
        train(tiny_adapter(), dataset, empty, settings, progress=False)


def test_the_summary_names_corrections_for_class_frequencies():
    dataset, labels = striped_data()

    def text(**change):
        settings = replace(SETTINGS, **change)
        return run_summary(dataset, labels, settings, make_accelerator(settings), num_classes=3)

    note = "the loss corrects for the class frequencies of dual batches"
    assert note in text(loss="logit_adjusted")
    assert note in text(loss="focal", reweight_from=2)
    assert note not in text(loss="focal")
    assert note not in text(loss="logit_adjusted", sampling="instance")
    short = text(loss="ldam", reweight_from=2, group=replace(PHASE, epochs=2))
    assert "phase group ends before epoch 2, from which class weights apply" in short
    assert "phase shared ends" not in short
