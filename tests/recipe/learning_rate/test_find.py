"""find_learning_rate: the steps against an explicit loop, and a model that is as before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lpt_peft import DualSampler
from lpt_peft.errors import ConfigError
from lpt_peft.heads import CosineClassifier
from lpt_peft.output import AdapterOutput
from lpt_peft.recipe import find_learning_rate, train
from lpt_peft.vit_classifier import ViTClassifier
from tests.conftest import tiny_vit
from tests.recipe.tiny import (
    PHASE,
    SETTINGS,
    SHORT,
    STEPS_PER_EPOCH,
    FailingLoss,
    NoiseFreeLoss,
    PowerCut,
    RandomlyScaled,
    result_of,
    same,
    striped_data,
    tiny_adapter,
)

QUICK = {"progress": False, "steps": 20}


def complete_state(model):
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return tensors, flags, modes, torch.get_rng_state()


def assert_restored(model, before):
    tensors, flags, modes, generator = complete_state(model)
    assert same(tensors, before[0])
    assert (flags, modes) == before[1:3]
    assert torch.equal(generator, before[3])
    assert all(parameter.grad is None for parameter in model.parameters())


class Probe(nn.Module):
    """A head on pixels, with batch norm, whose buffers change in training."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3 * 32 * 32)
        self.head = CosineClassifier(3 * 32 * 32, 3)

    def forward(self, images, return_output=True):
        features = self.norm(images.flatten(1))
        empty = features.new_empty(len(features), 0)
        return AdapterOutput(self.head(features), features, features, empty, empty.long())


def test_the_losses_are_those_of_an_explicit_loop():
    """SGD without momentum and decay: two epochs of the sampler, the weights of the loss those of epoch 0."""
    dataset, labels = striped_data(dtype=torch.float64)
    images = torch.stack([image for image, _ in dataset])
    phase = replace(PHASE, momentum=0.0, weight_decay=0.0, head_learning_rate=3 * PHASE.learning_rate)
    settings = replace(SETTINGS, shared=phase, average=0.9)
    adapter, reference = (tiny_adapter(torch.float64, head_dropout=0.0) for _ in range(2))
    found = find_learning_rate(
        adapter,
        dataset,
        labels,
        settings,
        lowest=1e-3,
        highest=10.0,
        steps=20,
        criterion=NoiseFreeLoss(PHASE.epochs),
        progress=False,
    )
    sampler, loss_of = DualSampler(labels, 16, samples_per_class=4, num_batches=STEPS_PER_EPOCH), NoiseFreeLoss(4)
    head, shared = reference.head.weight, reference.shared.prompts
    expected = []
    for step in range(20):
        epoch, position = divmod(step, STEPS_PER_EPOCH)
        sampler.set_epoch(epoch)
        rows = list(sampler)[position]
        target = torch.tensor([labels[row] for row in rows])
        loss = loss_of(reference(images[rows], return_output=True), target, 0)
        gradients = torch.autograd.grad(loss, [head, shared])
        rate = 1e-3 * 10 ** (4 * step / 19)
        with torch.no_grad():
            head.sub_(3 * rate * 8 / 256 * gradients[0])
            shared.sub_(rate * 8 / 256 * gradients[1])
        expected.append(loss.item())
    assert found.losses == pytest.approx(expected[: len(found.losses)], abs=1e-9)
    assert len(found.losses) == 20
    assert found.rates == pytest.approx([1e-3 * 10 ** (4 * step / 19) for step in range(20)])
    assert found.phase == "shared"


@pytest.mark.parametrize("phase", ["shared", "group"])
@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, optimizer="adamw", weight_noise=0.1)])
def test_an_adapter_is_restored(phase, settings):
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    adapter.phase = "group" if phase == "shared" else "shared"
    adapter.pool.usage.fill_(7)
    before = complete_state(adapter)
    found = find_learning_rate(adapter, RandomlyScaled(dataset), labels, settings, phase=phase, **QUICK)
    assert found.phase == phase
    assert adapter.phase == ("group" if phase == "shared" else "shared")
    assert_restored(adapter, before)


def test_joint_training_is_restored():
    dataset, labels = striped_data()
    adapter = tiny_adapter().eval()
    before = complete_state(adapter)
    assert find_learning_rate(adapter, dataset, labels, replace(SETTINGS, phases="joint"), **QUICK).phase == "joint"
    assert_restored(adapter, before)


def test_any_other_model_is_restored_with_its_buffers():
    dataset, labels = striped_data()
    model = Probe().eval()
    before = complete_state(model)
    found = find_learning_rate(model, dataset, labels, SETTINGS, **{**QUICK, "steps": 60})
    assert found.losses[-1] < found.losses[0]
    assert_restored(model, before)


@pytest.mark.parametrize("method", ["linear_probe", "full", "vpt_deep"])
def test_every_method_is_tested_and_restored(method):
    dataset, labels = striped_data()
    model = tiny_adapter() if method == "vpt_deep" else ViTClassifier.wrap(tiny_vit(), 3, method=method)
    before = complete_state(model)
    settings = replace(SETTINGS, method=method, loss="cross_entropy", init_head="class_mean")
    found = find_learning_rate(model, dataset, labels, settings, **QUICK)
    assert len(found.losses) >= 12
    assert_restored(model, before)


def test_a_run_after_the_test_is_the_same():
    dataset, labels = striped_data()
    tested, expected = tiny_adapter(), tiny_adapter()
    find_learning_rate(tested, dataset, labels, SHORT, **QUICK)
    for adapter in (tested, expected):
        train(adapter, dataset, labels, SHORT, progress=False)
    assert same(result_of(tested), result_of(expected))


def test_a_failing_step_restores_the_model():
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    before = complete_state(adapter)
    with pytest.raises(PowerCut):
        find_learning_rate(adapter, dataset, labels, SETTINGS, criterion=FailingLoss(3), **QUICK)
    assert_restored(adapter, before)


def test_a_loss_that_is_not_finite_ends_the_test():
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    before = complete_state(adapter)
    losses = []

    def criterion(output, target, epoch):
        losses.append(torch.nn.functional.cross_entropy(output.logits, target))
        return losses[-1] if len(losses) < 13 else losses[-1] * float("nan")

    found = find_learning_rate(adapter, dataset, labels, SETTINGS, criterion=criterion, **QUICK)
    assert found.losses == pytest.approx([loss.item() for loss in losses[:12]])
    assert len(found.rates) == 12
    assert_restored(adapter, before)


def test_a_useful_rate_is_found():
    """On stripes: the suggested rate trains, rates of a hundredth of it do not, in as many steps."""
    dataset, labels = striped_data()
    found = find_learning_rate(tiny_adapter(), dataset, labels, SETTINGS, progress=False)
    losses = []
    for factor in (0.01, 1.0):
        phase = replace(PHASE, learning_rate=factor * found.suggestion)
        history = train(
            tiny_adapter(),
            dataset,
            labels,
            replace(SETTINGS, shared=phase, group=replace(PHASE, epochs=0)),
            progress=False,
        )
        losses.append(history[-1]["loss"])
    assert losses[1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"phase": "joint"}, "phase='joint' must be among the phases that the settings train: shared, group"),
        ({"lowest": 0.0}, "lowest=0, highest=100 and steps=20 must be rising rates above 0"),
        ({"lowest": 2.0, "highest": 1.0}, "lowest=2, highest=1"),
        ({"highest": float("inf")}, "highest=inf"),
        ({"steps": 19}, "steps=19 must be rising rates above 0, and at least 20 steps"),
    ],
)
def test_refusals(options, words):
    dataset, labels = striped_data()
    with pytest.raises(ConfigError) as refusal:
        find_learning_rate(tiny_adapter(), dataset, labels, SETTINGS, **{**QUICK, **options})
    assert words in str(refusal.value)
