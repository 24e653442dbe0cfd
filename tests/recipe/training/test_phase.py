"""A run compared with an explicit loop: rates, SGD, AdamW, decay, clipping, average, accumulation, weight noise."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.utils.data import TensorDataset

from lpt_peft import DualSampler
from lpt_peft._random import derive_seed
from lpt_peft.errors import ConfigError, StateError
from lpt_peft.recipe import make_accelerator, run_phase, train
from lpt_peft.recipe.parallel import check_accelerator
from lpt_peft.vit_classifier import ViTClassifier
from tests.conftest import tiny_vit
from tests.recipe.tiny import PHASE, SETTINGS, STEPS_PER_EPOCH, NoiseFreeLoss, striped_data, tiny_adapter

NOISE_FREE = {"progress": False, "criterion": NoiseFreeLoss(PHASE.epochs)}


def explicit_loop(
    adapter,
    names,
    *,
    phase,
    clip=None,
    decay=0.01,
    selected=False,
    average=None,
    momentum=0.9,
    warmup=0.05,
    adamw=False,
    own_rates=None,
    noise=0.0,
):
    """A phase in plain arithmetic: trained values, learning rate of every step, mean loss of every epoch."""
    dataset, labels = striped_data(dtype=torch.float64)
    images = torch.stack([image for image, _ in dataset])
    sampler, loss_of = DualSampler(labels, 16, samples_per_class=4), NoiseFreeLoss(PHASE.epochs)
    total = PHASE.epochs * STEPS_PER_EPOCH
    warmup_steps = round(warmup * total)
    values = {name: adapter.get_parameter(name) for name in names}
    momenta, squares, rates, losses, step = {}, {}, [], [], 0
    mean = {name: value.detach().clone() for name, value in values.items()}
    for epoch in range(PHASE.epochs):
        sampler.set_epoch(epoch)
        for rows in sampler:
            target = torch.tensor([labels[row] for row in rows])
            generator = torch.Generator().manual_seed(derive_seed(SETTINGS.seed, phase, "weight noise", step))
            clean = {name: value.detach().clone() for name, value in values.items()}
            with torch.no_grad():
                for name, value in adapter.named_parameters() if noise else ():
                    if name not in values:
                        continue
                    eps = (torch.randn(value.shape, generator=generator, dtype=torch.float64) / 3).clamp(-1, 1)
                    value.add_(noise * value.norm() / math.sqrt(value.numel()) * eps)
            loss = loss_of(adapter(images[rows], return_output=True), target, epoch)
            gradients = dict(zip(names, torch.autograd.grad(loss, list(values.values())), strict=True))
            factor = (
                (step + 1) / warmup_steps
                if step < warmup_steps
                else 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / (total - warmup_steps))
            )
            rates.append(PHASE.learning_rate * (1 if adamw else 8 / 256) * factor)
            with torch.no_grad():
                for name, value in values.items():
                    value.copy_(clean[name])
            if selected and not adamw:
                for name in ("pool.prompts", "pool.keys"):
                    if name in gradients:
                        gradient = gradients[name]
                        gradients[name] = gradient + decay * values[name].detach() * selected_rows(gradient)
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
            shrink = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
            with torch.no_grad():
                for name, value in values.items():
                    gradient = shrink * gradients[name]
                    rate = rates[-1] * (own_rates or {}).get(name, PHASE.learning_rate) / PHASE.learning_rate
                    if adamw:
                        first = momentum * momenta.get(name, 0) + (1 - momentum) * gradient
                        second = 0.999 * squares.get(name, 0) + 0.001 * gradient**2
                        momenta[name], squares[name] = first, second
                        unbiased = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                        rows_to_decay = selected_rows(gradient) if selected and "pool" in name else 1.0
                        value.sub_(rate * decay * rows_to_decay * value)
                        value.sub_(rate * first / (1 - momentum ** (step + 1)) / unbiased)
                    else:
                        if not (selected and "pool" in name):
                            gradient = gradient + decay * value
                        momenta[name] = gradient if name not in momenta else momentum * momenta[name] + gradient
                        value.sub_(rate * momenta[name])
                    if average:
                        d = min(average, (1 + step) / (10 + step))
                        mean[name] = d * mean[name] + (1 - d) * value
            losses.append(loss.item())
            step += 1
    final = mean if average else {name: value.detach() for name, value in values.items()}
    return final, rates, torch.tensor(losses).reshape(PHASE.epochs, STEPS_PER_EPOCH).double().mean(1).tolist()


def selected_rows(gradient):
    selected = gradient.flatten(1).abs().sum(1) > 0
    return selected.double().view(-1, *[1] * (gradient.ndim - 1))


@pytest.mark.parametrize("phase", ["shared", "group"])
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"clip_norm": 0.3}, {"clip": 0.3}),
        ({"average": 0.9}, {"average": 0.9}),
        ({"accumulate": 4}, {}),
        ({"decay": "selected", "clip_norm": 0.5}, {"selected": True, "clip": 0.5}),
        ({"optimizer": "adamw"}, {"adamw": True}),
        (
            {"optimizer": "adamw", "decay": "selected", "clip_norm": 0.1, "average": 0.9, "accumulate": 2},
            {"adamw": True, "selected": True, "clip": 0.1, "average": 0.9},
        ),
        ({"weight_noise": 0.3, "accumulate": 4}, {"noise": 0.3}),
        ({"optimizer": "adamw", "weight_noise": 0.3, "head_learning_rate": 0.7}, {"adamw": True, "noise": 0.3}),
        ({"head_learning_rate": 0.7, "pool_learning_rate": 3.0}, {}),
        ({"pool_learning_rate": 3.0, "decay": "selected"}, {"selected": True}),
        (
            {"pool_learning_rate": 3.0, "decay": "selected", "optimizer": "adamw"},
            {"adamw": True, "selected": True},
        ),
    ],
)
def test_a_phase_equals_the_explicit_loop(phase, settings, options):
    dataset, labels = striped_data(dtype=torch.float64)
    adapter, reference = (tiny_adapter(torch.float64, head_dropout=0.0) for _ in range(2))
    adapter.phase = reference.phase = phase
    names = ["head.weight", *(["shared.prompts"] if phase == "shared" else ["pool.prompts", "pool.keys"])]
    own = {name: value for name, value in settings.items() if name.endswith("_learning_rate")}
    settings = replace(SETTINGS, **{name: value for name, value in settings.items() if name not in own})
    tuned = replace(PHASE, **own)
    parameters = {"head_learning_rate": "head.weight", "pool_learning_rate": "pool.prompts"}
    own_rates = {parameters[name]: rate for name, rate in own.items()}
    history = run_phase(adapter, dataset, labels, settings, tuned, name=phase, **NOISE_FREE)
    final, rates, losses = explicit_loop(reference, names, phase=phase, own_rates=own_rates, **options)
    tolerance = 1e-7 if settings.optimizer == "adamw" else 1e-10  # AdamW divides by square roots of tiny numbers
    for name in names:
        torch.testing.assert_close(adapter.get_parameter(name).detach(), final[name], rtol=0, atol=tolerance, msg=name)
    assert [record["learning_rate"] for record in history] == pytest.approx(
        rates[STEPS_PER_EPOCH - 1 :: STEPS_PER_EPOCH]
    )
    assert history[-1]["learning_rate"] > 0, "the rate of the last step, not the rate after it"
    assert [record["loss"] for record in history] == pytest.approx(losses)


def test_joint_training_trains_everything_at_once():
    dataset, labels = striped_data(dtype=torch.float64)
    settings = replace(SETTINGS, phases="joint", init_keys="random", init_groups="random")
    adapter, reference = (tiny_adapter(torch.float64, head_dropout=0.0) for _ in range(2))
    history = train(adapter, dataset, labels, settings, **NOISE_FREE)
    reference.phase = "group"
    reference.shared.requires_grad_(True)
    names = ["shared.prompts", "pool.prompts", "pool.keys", "head.weight"]
    final, _, _ = explicit_loop(reference, names, phase="joint")
    for name in names:
        torch.testing.assert_close(adapter.get_parameter(name).detach(), final[name], rtol=0, atol=1e-10, msg=name)
    assert [record["phase"] for record in history] == ["joint"] * PHASE.epochs
    assert adapter.phase == "group"
    assert not adapter.shared.prompts.requires_grad, "joint training has ended"


def test_chunks_must_be_equal():
    dataset, labels = striped_data()
    with pytest.raises(
        ConfigError,
        match="batch_size=16 cannot be divided evenly: two halves, 1 processes, accumulate=3. Give a multiple of 6",
    ):
        train(tiny_adapter(), dataset, labels, replace(SETTINGS, accumulate=3), progress=False)


def test_accumulation_by_accelerate_is_refused():
    accelerator = make_accelerator(SETTINGS, gradient_accumulation_steps=4)
    dataset, labels = striped_data()
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps=4.*TrainSettings\(accumulate"):
        train(tiny_adapter(), dataset, labels, SETTINGS, accelerator=accelerator, progress=False)


def test_sharded_models_are_refused():
    with pytest.raises(ConfigError, match="complete model on every process, but Accelerate is set to FSDP"):
        check_accelerator(SimpleNamespace(distributed_type=DistributedType.FSDP, gradient_accumulation_steps=1))


def test_bfloat16_computation_trains_float32_parameters():
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


@pytest.mark.parametrize("head", [None, 0.5])
def test_the_progress_of_a_linear_probe_shows_the_rate_of_its_head(head):
    """Nothing is trained with learning_rate if only the head is trained, with a rate for the head."""
    dataset, labels = striped_data()
    phase = replace(PHASE, epochs=1, warmup=0, learning_rate=0.125, head_learning_rate=head)
    model = ViTClassifier.wrap(tiny_vit(), 3, method="linear_probe")
    before = model.head.weight.detach().clone()
    settings = replace(SETTINGS, method="linear_probe", optimizer="sgd", shared=phase, group=phase, num_workers=0)
    settings = replace(settings, loss="cross_entropy", sampling="instance")
    peak = (head or 0.125) * 8 / 256
    [record] = train(model, dataset, labels, settings, progress=False)
    assert not torch.equal(model.head.weight, before)
    steps = STEPS_PER_EPOCH
    expected = peak * 0.5 * (1 + math.cos(math.pi * (steps - 1) / steps))
    assert record["learning_rate"] == pytest.approx(expected, rel=1e-6)
    broken = TensorDataset(dataset.tensors[0] * float("nan"), dataset.tensors[1])
    name = "learning_rate \\(now 0.125\\)" if head is None else "head_learning_rate \\(now 0.5\\)"
    with pytest.raises(StateError, match=f"Lower {name}, set clip_norm"):
        train(model, broken, labels, settings, progress=False)
