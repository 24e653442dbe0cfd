"""The two-phase loop on a tiny ViT and tiny data: which parameters it trains, and its result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lpt_peft import LongTailPromptAdapter, LPTLoss, ShotMetrics
from lpt_peft.recipe import evaluate, make_accelerator, predict, run_phase, train, warmup_cosine
from tests.conftest import tiny_vit
from tests.recipe.tiny import COUNTS, PHASE, SETTINGS, STEPS_PER_EPOCH, striped_data, tiny_adapter


def test_two_phases_train_only_their_parameters():
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    frozen = {name: p.clone() for name, p in adapter.vit.named_parameters()}
    start = {name: t.clone() for name, t in adapter.adapter_state_dict().items()}
    long, skipped = replace(PHASE, epochs=16), replace(PHASE, epochs=0)
    history = train(adapter, dataset, labels, replace(SETTINGS, shared=long, group=skipped), progress=False)
    after_shared = {name: t.clone() for name, t in adapter.adapter_state_dict().items()}
    changed = {name for name in start if not torch.equal(start[name], after_shared[name])}
    assert changed == {"shared.prompts", "head.weight"}
    history += train(adapter, dataset, labels, replace(SETTINGS, shared=skipped, group=long), progress=False)
    changed = {n for n, t in adapter.adapter_state_dict().items() if not torch.equal(t, after_shared[n])}
    assert changed == {"pool.prompts", "pool.keys", "head.weight"}
    assert all(torch.equal(p, frozen[name]) for name, p in adapter.vit.named_parameters())
    assert adapter.phase == "group"
    assert not adapter.training
    assert [(r["phase"], r["epoch"]) for r in history] == [
        (phase, e) for phase in ("shared", "group") for e in range(16)
    ]
    assert history[15]["loss"] < history[0]["loss"]
    assert history[-1]["learning_rate"] < 0.1 * PHASE.learning_rate * 8 / 256
    result = evaluate(adapter, dataset, ShotMetrics(COUNTS, many=10, few=5))
    assert result.overall > 0.9


def test_runs_repeat_exactly_and_leave_random_state():
    dataset, labels = striped_data()
    twins = [tiny_adapter(), tiny_adapter()]
    for twin in twins:
        state = torch.get_rng_state()
        train(twin, dataset, labels, SETTINGS, progress=False)
        assert torch.equal(torch.get_rng_state(), state)
    first, second = (twin.adapter_state_dict() for twin in twins)
    assert all(torch.equal(first[name], second[name]) for name in first)
    reseeded = tiny_adapter()
    train(reseeded, dataset, labels, replace(SETTINGS, seed=1), progress=False)
    assert not torch.equal(reseeded.shared.prompts, twins[0].shared.prompts)


@pytest.mark.parametrize("keys", ["kmeans", "random"])
@pytest.mark.parametrize("decay", ["all", "selected"])
@pytest.mark.parametrize("groups", ["shared", "random"])
def test_switches(keys, decay, groups):
    dataset, labels = striped_data()
    settings = replace(SETTINGS, init_keys=keys, init_groups=groups, decay=decay, clip_norm=1.0)
    history = train(tiny_adapter(), dataset, labels, settings, progress=False)
    assert len(history) == 8


def test_only_selected_groups_decay_if_so_configured():
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    adapter.phase = "group"
    with torch.no_grad():  # group 3 is never selected: it points away from every query
        query = adapter.features(torch.stack([image for image, _ in dataset])).mean(0)
        adapter.pool.keys[:3] = query + 0.01 * torch.randn(3, 24)
        adapter.pool.keys[3] = -query
    before = adapter.pool.prompts[3].clone()
    phase = replace(PHASE, weight_decay=0.1)
    run_phase(adapter, dataset, labels, replace(SETTINGS, decay="selected"), phase, progress=False)
    assert adapter.pool.dead_groups() == [3]
    assert torch.equal(adapter.pool.prompts[3], before)
    run_phase(adapter, dataset, labels, SETTINGS, phase, progress=False)
    assert not torch.equal(adapter.pool.prompts[3], before)


def test_cross_entropy_on_instance_batches():
    dataset, labels = striped_data()
    settings = replace(SETTINGS, loss="cross_entropy", sampling="instance")
    seen = []

    def criterion(output, target, epoch):
        seen.append(target.tolist())
        return torch.nn.functional.cross_entropy(output.logits, target)

    run_phase(tiny_adapter(), dataset, labels, settings, PHASE, criterion=criterion, progress=False)
    assert [len(batch) for batch in seen] == [16] * (4 * (31 // 8 + 1)), "as many images as with dual sampling"
    assert seen[0] != seen[4]


def test_the_loss_takes_the_scale_of_the_head(monkeypatch):
    """A margin is a cosine: its effect on the logits must follow the head's scale."""
    seen = []

    def recorded(*args, **options):
        seen.append(options)
        return LPTLoss(*args, **options)

    monkeypatch.setattr("lpt_peft.recipe.training.criteria.LPTLoss", recorded)
    dataset, labels = striped_data()
    adapter = LongTailPromptAdapter.wrap(tiny_vit(), 3, prompt_length=2, pool_size=4, logit_scale=7.0)
    run_phase(adapter, dataset, labels, SETTINGS, replace(PHASE, epochs=1), progress=False)
    assert seen[0]["scale"] == 7.0


def test_predict_keeps_order_type_and_mode():
    dataset, labels = striped_data()
    adapter = tiny_adapter().train()
    output, target = predict(adapter, dataset, batch_size=7)
    assert adapter.training
    assert target.tolist() == labels
    adapter.eval()
    expected = adapter(torch.stack([image for image, _ in dataset]), return_output=True)
    torch.testing.assert_close(output.logits, expected.logits)
    assert type(output) is type(expected)


def test_schedule():
    curve = [warmup_cosine(step, 100, 10) for step in range(100)]
    assert curve[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert max(curve) == 1.0
    assert all(a >= b for a, b in zip(curve[9:], curve[10:], strict=False))
    assert 0 < curve[-1] < 0.001
    assert warmup_cosine(0, 10, 0) == 1.0


def test_steps_that_a_gradient_scaler_skips_are_reported(capsys):
    """An infinite gradient in the second epoch halves the scale; float32 parameters, so the CPU scaler can be used."""
    dataset, labels = striped_data()
    accelerator = make_accelerator(SETTINGS)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    losses = []

    def criterion(output, target, epoch):
        losses.append(0)
        if len(losses) == STEPS_PER_EPOCH + 2:
            output.logits.register_hook(lambda gradient: gradient * float("inf"))
        return torch.nn.functional.cross_entropy(output.logits, target)

    history = run_phase(
        tiny_adapter(), dataset, labels, SETTINGS, PHASE, name="shared", criterion=criterion, accelerator=accelerator
    )
    assert [record["loss_scale"] for record in history] == [1024, 512, 512, 512]
    message = "shared: the loss scale fell from 1024 to 512, since gradients overflowed in float16"
    assert capsys.readouterr().err.count(message) == 1
