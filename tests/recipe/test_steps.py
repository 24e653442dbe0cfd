"""A whole run against a loop written out by hand: rate, momentum, decay, clipping, average, accumulation."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from lpt_peft import DualSampler
from lpt_peft.errors import ConfigError
from lpt_peft.recipe import make_accelerator, run_phase, train
from lpt_peft.recipe.parallel import check_accelerator
from tests.recipe.tiny import COUNTS, PHASE, SETTINGS, QuietLoss, striped_data, tiny_adapter

QUIET = {"progress": False, "criterion": QuietLoss(PHASE.epochs)}
SIZE = sum(COUNTS)
PER_EPOCH = SIZE // 8 + 1


def by_hand(adapter, names, *, clip=None, decay=0.01, selected=False, average=None, momentum=0.9, warmup=0.05):
    """One phase as method.md tells it, in plain arithmetic; the learnt values and the rate of every step."""
    dataset, labels = striped_data(dtype=torch.float64)
    images = torch.stack([image for image, _ in dataset])
    sampler, loss_of = DualSampler(labels, 16, samples_per_class=4), QuietLoss(PHASE.epochs)
    total = PHASE.epochs * PER_EPOCH
    rising = round(warmup * total)
    values = {name: adapter.get_parameter(name) for name in names}
    speed, rates, losses, step = {}, [], [], 0
    mean = {name: value.detach().clone() for name, value in values.items()}
    for epoch in range(PHASE.epochs):
        sampler.set_epoch(epoch)
        for rows in sampler:
            target = torch.tensor([labels[row] for row in rows])
            loss = loss_of(adapter(images[rows], return_output=True), target, epoch)
            gradients = dict(zip(names, torch.autograd.grad(loss, list(values.values())), strict=True))
            factor = (
                (step + 1) / rising
                if step < rising
                else 0.5 + 0.5 * math.cos(math.pi * (step - rising) / (total - rising))
            )
            rates.append(PHASE.learning_rate * 8 / 256 * factor)
            if selected:
                for name in ("pool.prompts", "pool.keys"):
                    if name in gradients:
                        gradient = gradients[name]
                        gradients[name] = gradient + decay * values[name].detach() * chosen_rows(gradient)
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
            shrink = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
            with torch.no_grad():
                for name, value in values.items():
                    gradient = shrink * gradients[name]
                    if not (selected and "pool" in name):
                        gradient = gradient + decay * value
                    speed[name] = gradient if name not in speed else momentum * speed[name] + gradient
                    value.sub_(rates[-1] * speed[name])
                    if average:
                        d = min(average, (1 + step) / (10 + step))
                        mean[name] = d * mean[name] + (1 - d) * value
            losses.append(loss.item())
            step += 1
    final = mean if average else {name: value.detach() for name, value in values.items()}
    return final, rates, [sum(losses[e * PER_EPOCH : (e + 1) * PER_EPOCH]) / PER_EPOCH for e in range(PHASE.epochs)]


def chosen_rows(gradient):
    chosen = gradient.flatten(1).abs().sum(1) > 0
    return chosen.double().view(-1, *[1] * (gradient.ndim - 1))


@pytest.mark.parametrize("phase", ["shared", "group"])
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, {}),
        ({"clip_norm": 0.3}, {"clip": 0.3}),
        ({"average": 0.9}, {"average": 0.9}),
        ({"accumulate": 4}, {}),
        ({"decay": "selected", "clip_norm": 0.5}, {"selected": True, "clip": 0.5}),
    ],
)
def test_a_phase_is_what_the_recipe_says(phase, settings, told):
    dataset, labels = striped_data(dtype=torch.float64)
    ours, theirs = (tiny_adapter(torch.float64, head_dropout=0.0) for _ in range(2))
    ours.phase = theirs.phase = phase
    names = ["head.weight", *(["shared.prompts"] if phase == "shared" else ["pool.prompts", "pool.keys"])]
    history = run_phase(ours, dataset, labels, replace(SETTINGS, **settings), PHASE, name=phase, **QUIET)
    final, rates, losses = by_hand(theirs, names, **told)
    for name in names:
        torch.testing.assert_close(ours.get_parameter(name).detach(), final[name], rtol=0, atol=1e-10, msg=name)
    assert [record["learning_rate"] for record in history] == pytest.approx(rates[PER_EPOCH - 1 :: PER_EPOCH])
    assert history[-1]["learning_rate"] > 0, "the rate that the last step used, not the one after it"
    assert [record["loss"] for record in history] == pytest.approx(losses)


def test_joint_training_opens_everything_at_once():
    dataset, labels = striped_data(dtype=torch.float64)
    settings = replace(SETTINGS, phases="joint", init_keys="random", init_groups="random")
    ours, theirs = (tiny_adapter(torch.float64, head_dropout=0.0) for _ in range(2))
    history = train(ours, dataset, labels, settings, **QUIET)
    theirs.phase = "group"
    theirs.shared.requires_grad_(True)
    names = ["shared.prompts", "pool.prompts", "pool.keys", "head.weight"]
    final, _, _ = by_hand(theirs, names)
    for name in names:
        torch.testing.assert_close(ours.get_parameter(name).detach(), final[name], rtol=0, atol=1e-10, msg=name)
    assert [record["phase"] for record in history] == ["joint"] * PHASE.epochs
    assert ours.phase == "group"
    assert not ours.shared.prompts.requires_grad, "joint training is over"


def test_parts_must_be_even():
    dataset, labels = striped_data()
    with pytest.raises(ConfigError, match="batch_size=8 cannot be shared out evenly by 1 processes in accumulate=3"):
        train(tiny_adapter(), dataset, labels, replace(SETTINGS, accumulate=3), progress=False)


def test_accelerates_own_accumulation_is_refused():
    accelerator = make_accelerator(SETTINGS, gradient_accumulation_steps=4)
    dataset, labels = striped_data()
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps=4.*TrainSettings\(accumulate"):
        train(tiny_adapter(), dataset, labels, SETTINGS, accelerator=accelerator, progress=False)


def test_sharded_models_are_refused():
    with pytest.raises(ConfigError, match="whole model on every process; Accelerate is set to FSDP"):
        check_accelerator(SimpleNamespace(distributed_type=DistributedType.FSDP, gradient_accumulation_steps=1))


def test_bfloat16_passes_learn_in_float32():
    seen = []

    def criterion(output, target, epoch):
        seen.append(output.features.dtype)
        return torch.nn.functional.cross_entropy(output.logits, target)

    dataset, labels = striped_data()
    adapter = tiny_adapter()
    adapter.backbone.model.blocks[0].mlp.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    AcceleratorState._reset_state()
    try:
        settings = replace(SETTINGS, mixed_precision="bf16", group=replace(PHASE, epochs=0))
        train(adapter, dataset, labels, settings, criterion=criterion, progress=False)
    finally:
        AcceleratorState._reset_state()
    assert torch.bfloat16 in seen
    assert all(tensor.dtype == torch.float32 for tensor in adapter.adapter_state_dict().values())
