"""Methods of a run: what each trains, against loops by hand; resume, processes, settings that do not fit."""

from __future__ import annotations

import copy
import signal
from dataclasses import fields, replace

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize

from lpt_peft._run_folder import MODEL_METHODS
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.errors import ConfigError, StateError
from lpt_peft.recipe import Splits, TrainSettings, find_learning_rate, fit, make_accelerator, train, warmup_cosine
from lpt_peft.recipe.loading.batches import batches
from lpt_peft.recipe.method_settings import METHODS, unused_fields, unused_settings
from lpt_peft.recipe.resume.checkpoint_io import checkpoints, read_checkpoint
from lpt_peft.recipe.summary import run_summary
from lpt_peft.recipe.training.phase import PhaseRun
from lpt_peft.vit_classifier import ViTClassifier
from tests.conftest import tiny_vit
from tests.processes import Child, run_ranks
from tests.recipe.tiny import (
    PHASE,
    SHORT,
    STEPS_PER_EPOCH,
    TWO_PHASES,
    FailingLoss,
    PowerCut,
    RandomlyScaled,
    kill_this_process,
    power_cut,
    result_of,
    same,
    striped_data,
    tiny_adapter,
)

METHOD_PHASE = replace(PHASE, epochs=2, learning_rate=0.2)
BASE = TrainSettings(shared=replace(METHOD_PHASE, head_learning_rate=0.2), batch_size=16, save_every=2, **TWO_PHASES)
methods = pytest.mark.parametrize("method", MODEL_METHODS)


def classifier(method, dtype=torch.float32, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTClassifier.wrap(tiny_vit().to(dtype), 3, method=method, **options)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@methods
def test_training_equals_a_loop_by_hand(method):
    """Cross-entropy and SGD on the ViT's own forward, in double precision."""
    plain = replace(BASE, method=method, loss="cross_entropy", sampling="instance")
    dataset, labels = striped_data(dtype=torch.float64)
    model = classifier(method, torch.float64, head_dropout=0.0)
    vit, weight = copy.deepcopy(model.vit), model.head.weight.detach().clone().requires_grad_()
    history = train(model, dataset, labels, plain, progress=False)
    trained = [weight, *(vit.parameters() if method == "full" else [])]
    for parameter in vit.parameters():
        parameter.requires_grad_(method == "full")
    optimizer = torch.optim.SGD(trained, lr=1.0, momentum=METHOD_PHASE.momentum, weight_decay=METHOD_PHASE.weight_decay)
    steps = 2 * STEPS_PER_EPOCH
    losses = []
    for step, (images, target) in enumerate(batches(dataset, labels, plain, "shared", epochs=2)):
        rate = METHOD_PHASE.learning_rate * 8 / 256 * warmup_cosine(step, steps, round(0.05 * steps))
        optimizer.param_groups[0]["lr"] = rate
        features = vit.forward_head(vit.forward_features(images), pre_logits=True)
        loss = cross_entropy(20 * normalize(features) @ normalize(weight).T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    for name, tensor in vit.state_dict().items():
        torch.testing.assert_close(model.vit.state_dict()[name], tensor, atol=1e-10, rtol=1e-8, msg=name)
    torch.testing.assert_close(model.head.weight, weight, atol=1e-10, rtol=1e-8)
    expected = [sum(losses[i : i + STEPS_PER_EPOCH]) / STEPS_PER_EPOCH for i in (0, STEPS_PER_EPOCH)]
    assert [record["loss"] for record in history] == pytest.approx(expected, rel=1e-6)
    assert [(record["phase"], record["epoch"]) for record in history] == [("shared", 0), ("shared", 1)]


@methods
def test_a_method_changes_only_what_it_trains(method):
    dataset, labels = striped_data()
    model = classifier(method)
    before = state_of(model)
    train(model, dataset, labels, replace(BASE, method=method), progress=False)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed == trained
    assert not any(name.startswith("vit.head") for name in changed), "the ViT's own classifier has no gradient"
    assert not model.training


def test_vpt_deep_is_phase_shared_alone():
    dataset, labels = striped_data()
    results = []
    for settings in (replace(SHORT, method="vpt_deep"), replace(SHORT, group=replace(PHASE, epochs=0))):
        adapter = tiny_adapter()
        train(adapter, dataset, labels, settings, progress=False)
        assert adapter.phase == "shared"
        results.append(result_of(adapter))
    assert same(*results)


def test_all_methods_see_the_same_crops():
    dataset, labels = striped_data()
    seen = []
    for model in (tiny_adapter(), classifier("linear_probe"), classifier("full")):
        method = getattr(model, "method", "vpt_deep")
        images = []
        model.register_forward_pre_hook(lambda _, args, images=images: images.append(args[0].clone()))
        train(model, RandomlyScaled(dataset), labels, replace(BASE, method=method), progress=False)
        seen.append(torch.cat([batch for batch in images if len(batch) == 16]))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


EVERYTHING = {"average": 0.9, "keep": "best", "clip_norm": 1.0}


def run(folder, method, *, step=None, fail=power_cut, model=None):
    """A run with everything enabled that fails at `step` of this process; its result and history."""
    dataset, labels = striped_data()
    model = model or classifier(method)
    settings = replace(BASE, method=method, **EVERYTHING)
    history = train(
        model,
        RandomlyScaled(dataset),
        labels,
        settings,
        validation=striped_data(1)[0],
        criterion=FailingLoss(step, fail, epochs=2),
        checkpoints=folder,
        progress=False,
    )
    return state_of(model), history


@methods
@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_killed_run_resumes_to_the_last_bit(tmp_path, method, step):
    with Child(run_killed, tmp_path, method, step) as child:
        assert child.wait() == -signal.SIGKILL, child.output
    assert bool(checkpoints(tmp_path)) == (step > 1)
    result, history = run(tmp_path, method)
    expected, expected_history = run(None, method)
    assert same(result, expected)
    assert history == expected_history


def run_killed(folder, method, step):
    run(folder, method, step=step, fail=kill_this_process)


def test_full_resumes_with_the_same_model_in_the_same_process(tmp_path):
    model = classifier("full")
    with pytest.raises(PowerCut):
        run(tmp_path, "full", step=5, model=model)
    result, _ = run(tmp_path, "full", model=model)
    assert same(result, run(None, "full")[0])


@methods
def test_a_checkpoint_holds_what_is_trained(tmp_path, method):
    run(tmp_path, method)
    tensors, _ = read_checkpoint(checkpoints(tmp_path)[-1])
    names = {name for name, parameter in classifier(method).named_parameters() if parameter.requires_grad}
    kinds = ("trained", "momentum", "average", "best")
    assert tensors.keys() == {f"{kind}/{name}" for kind in kinds for name in names}


def test_a_checkpoint_of_other_tensors_is_refused(tmp_path):
    model = classifier("full")
    with pytest.raises(PowerCut):
        run(tmp_path, "full", step=5, model=model)
    other = classifier("full")
    other.vit.norm.bias.requires_grad_(False)
    with pytest.raises(StateError, match="are not those that this model trains"):
        run(tmp_path, "full", model=other)


def test_a_run_on_other_weights_or_of_another_method_is_not_resumed(tmp_path):
    run(tmp_path, "linear_probe")
    other = classifier("linear_probe")
    with torch.no_grad():
        other.vit.norm.weight[0] += 1
    with pytest.raises(StateError, match="backbone fingerprint is"):
        run(tmp_path, "linear_probe", model=other)
    with pytest.raises(StateError, match="settings.method is 'full' now and was 'linear_probe'"):
        run(tmp_path, "full")


def double_precision_run(method):
    dataset, labels = striped_data(dtype=torch.float64)
    model = classifier(method, torch.float64, head_dropout=0.0)
    settings = replace(BASE, method=method, loss="cross_entropy", sampling="instance", accumulate=2, average=0.9)
    history = train(
        model, RandomlyScaled(dataset), labels, settings, validation=striped_data(1, torch.float64)[0], progress=False
    )
    return state_of(model), history


@methods
def test_two_processes_equal_a_single_process(method):
    (first, history), (second, _) = run_ranks(double_precision_run, method, init=False)
    expected, expected_history = double_precision_run(method)
    assert same(first, second)
    for name, tensor in expected.items():
        torch.testing.assert_close(first[name], tensor, atol=1e-10, rtol=1e-10, msg=name)
    assert [r["validation"] for r in history] == [r["validation"] for r in expected_history]


@pytest.mark.parametrize("options", [{"mixed_precision": "bf16"}, {"accumulate": 2}, {"optimizer": "adamw"}])
@methods
def test_options_of_the_loop(method, options):
    """Close to the plain run, which must itself reduce the loss."""
    dataset, labels = striped_data()
    losses = []
    for changes in ({**options, "mixed_precision": None}, options):
        AcceleratorState._reset_state(reset_partial_state=True)  # the first Accelerator fixes the precision
        model = classifier(method, head_dropout=0.0)
        settings = replace(BASE, method=method, loss="cross_entropy", shared=replace(METHOD_PHASE, epochs=3), **changes)
        losses.append([record["loss"] for record in train(model, dataset, labels, settings, progress=False)])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[1][-1] < losses[1][0]


@methods
def test_adamw_and_weight_noise_resume_to_the_last_bit(tmp_path, method):
    dataset, labels = striped_data()
    settings = replace(
        BASE,
        method=method,
        shared=replace(METHOD_PHASE, learning_rate=0.01),
        optimizer="adamw",
        weight_noise=0.1,
        init_head="class_mean",
    )

    def result(folder, step=None):
        model = classifier(method)
        criterion = FailingLoss(step, power_cut, epochs=2)
        train(model, dataset, labels, settings, criterion=criterion, checkpoints=folder, progress=False)
        return state_of(model)

    with pytest.raises(PowerCut):
        result(tmp_path, 5)
    assert same(result(tmp_path), result(None))


@methods
def test_the_range_test_of_learning_rates_leaves_the_model_as_it_was(method):
    dataset, labels = striped_data()
    model = classifier(method)
    before = state_of(model)
    settings = replace(BASE, method=method, init_head="class_mean")
    curve = find_learning_rate(model, dataset, labels, settings, steps=20, progress=False)
    assert curve.phase == "shared"
    assert len(curve.losses) >= 10
    assert same(state_of(model), before)
    with pytest.raises(ConfigError, match="give both the same method"):
        find_learning_rate(model, dataset, labels, replace(BASE, method="vpt_deep"), steps=20, progress=False)


def test_class_means_start_the_head(monkeypatch):
    """The head before the first step, against means of the features by hand."""
    dataset, labels = striped_data()
    model = classifier("linear_probe")
    settings = replace(BASE, method="linear_probe", init_head="class_mean", shared=replace(METHOD_PHASE, epochs=1))
    seen = []
    monkeypatch.setattr(PhaseRun, "training_step", lambda run, *_: seen.append(run.model.head.weight.clone()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(model, dataset, labels, settings, progress=False)
    features = model.eval().features(dataset.tensors[0]).double()
    means = torch.stack([features[torch.tensor(labels) == label].mean(0) for label in range(3)])
    torch.testing.assert_close(normalize(seen[0].double()), normalize(means), atol=1e-5, rtol=1e-5)


def test_a_probe_on_a_16_bit_backbone(tmp_path):
    dataset, labels = striped_data()
    model = classifier("linear_probe")
    fingerprint = model.fingerprint
    settings = replace(BASE, method="linear_probe", backbone_dtype="bfloat16")
    train(model, dataset, labels, settings, checkpoints=tmp_path, progress=False)
    assert (model.vit.norm.weight.dtype, model.head.weight.dtype) == (torch.bfloat16, torch.float32)
    model.save_pretrained(tmp_path / "model")
    loaded = ViTClassifier.from_pretrained(tmp_path / "model", tiny_vit())
    loaded.cast_backbone(torch.bfloat16)
    assert loaded.fingerprint == fingerprint
    assert loaded.metadata.backbone_dtype == "bfloat16"
    assert torch.equal(loaded(dataset.tensors[0]), model(dataset.tensors[0]))


PAIRS = [
    (lambda: classifier("full"), "lpt", 'the model is a ViTClassifier for method="full"'),
    (lambda: classifier("full"), "linear_probe", "give both the same method"),
    (tiny_adapter, "full", r'trains no prompts: give ViTClassifier.wrap\(vit, num_classes, method="full"\)'),
    (tiny_adapter, "linear_probe", "trains no prompts"),
    (tiny_adapter, "vpt_shallow", 'does not fit an adapter with placement="deep"'),
]


@pytest.mark.parametrize(("build", "method", "words"), PAIRS)
def test_a_model_of_another_method_is_refused(build, method, words, tmp_path):
    dataset, labels = striped_data()
    settings = replace(BASE, method=method)
    with pytest.raises(ConfigError, match=words):
        train(build(), dataset, labels, settings, progress=False)
    with pytest.raises(ConfigError, match=words):
        fit(build(), Splits(from_dataset(dataset, labels, ["a", "b", "c"])), settings, tmp_path, progress=False)


@given(st.sampled_from(METHODS), st.integers(0, 3), st.integers(0, 3))
def test_only_lpt_has_a_second_phase(method, shared, group):
    settings = TrainSettings(
        method=method, phases="decoupled", shared=replace(PHASE, epochs=shared), group=replace(PHASE, epochs=group)
    )
    epochs = {"shared": shared, "group": group if method == "lpt" else 0}
    assert {name: phase.epochs for name, phase in settings.plan.items()} == {n: e for n, e in epochs.items() if e}
    assert TrainSettings.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize("method", METHODS)
def test_settings_that_contradict_the_method(method):
    for phases in ("joint", "shared"):  # of other methods, all phases are a single one
        expected = phases if method == "lpt" else "shared"
        assert TrainSettings(method=method, phases=phases).plan.keys() == {expected}
    if method == "full":
        with pytest.raises(ConfigError, match="full.*trains the weights of the ViT, which backbone_dtype"):
            TrainSettings(method=method, backbone_dtype="bfloat16")
    else:
        TrainSettings(method=method, backbone_dtype="bfloat16")


def test_an_unknown_method():
    with pytest.raises(ConfigError, match=r"method='lora' must be one of \"lpt\", \"vpt_deep\""):
        TrainSettings(method="lora")
    with pytest.raises(ConfigError, match="method='lora' must be one of lpt, vpt_deep"):
        TrainSettings.from_dict({"method": "lora"})


@given(st.sampled_from(METHODS), st.sampled_from(["init_keys", "init_groups", "decay", "group"]))
def test_settings_without_effect_are_named(method, field):
    other = {"init_keys": "random", "init_groups": "random", "decay": "selected", "group": replace(PHASE, epochs=7)}
    settings = replace(TrainSettings(method=method), **{field: other[field]})
    assert list(unused_settings(settings)) == ([] if method == "lpt" else [field])
    assert list(unused_settings(TrainSettings(method=method))) == []
    assert unused_fields(method) <= {f.name for f in fields(TrainSettings)}


def test_the_summary_names_settings_without_effect():
    dataset, labels = striped_data()
    settings = replace(SHORT, method="full")
    text = run_summary(dataset, labels, settings, make_accelerator(settings), num_classes=3)
    assert "method full trains with the settings of shared and does not use group" in text
    assert "group 2 epochs" not in text
