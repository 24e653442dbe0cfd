"""Defaults: those of the best row on validation images of Emoji-LT, for every method, and what they keep."""

from __future__ import annotations

import gzip
import inspect
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpt_peft import LongTailPromptAdapter
from lpt_peft.cli.common.rows import default_settings, read_rows
from lpt_peft.cli.common.run_settings import PromptSettings
from lpt_peft.config import PromptConfig
from lpt_peft.errors import ConfigError
from lpt_peft.recipe import DEFAULT_RATES, PhaseSettings, TrainSettings, train
from lpt_peft.recipe.method_settings import METHODS, settings_without_effect, unused_settings
from lpt_peft.recipe.rates import learning_rates
from lpt_peft.recipe.training.phase import PhaseRun
from lpt_peft.vit_classifier import ViTClassifier
from tests.conftest import tiny_vit
from tests.processes import run_ranks
from tests.recipe.tiny import (
    FailingLoss,
    NoiseFreeLoss,
    PowerCut,
    RandomlyScaled,
    result_of,
    same,
    striped_data,
    tiny_adapter,
)

EMOJI = Path(__file__).parents[2] / "examples" / "benchmarks" / "emoji_lt"
FEW = TrainSettings(shared=PhaseSettings(epochs=2), batch_size=16, save_every=2)
"""The defaults, for a few steps."""


def best_row():
    rows = read_rows(str(EMOJI / "rows.toml"))
    return rows.settings(default_settings(rows))["joint_fast_groups"]


def published():
    return [json.loads(line) for line in gzip.decompress((EMOJI / "results.jsonl.gz").read_bytes()).splitlines()]


# -- where they come from ---------------------------------------------------------------------------------


def test_the_best_row_on_validation_images_is_joint_fast_groups():
    found = {}
    for line in published():
        if line["stage"] == "rows" and line["settings"]["training"]["method"] == "lpt":
            found.setdefault(line["row"], []).append(line["validation"]["overall"])
    means = {row: sum(values) / len(values) for row, values in found.items() if len(values) > 1}
    assert max(means, key=means.get) == "joint_fast_groups"
    assert f"{100 * means['joint_fast_groups']:.1f}" == "51.3"


def test_the_defaults_are_that_row():
    """Apart from sizes of the run: epochs, batch, precision and workers."""
    row = best_row()
    sized = {"shared": TrainSettings().shared, "group": TrainSettings().group}
    sized |= {name: getattr(TrainSettings(), name) for name in ("batch_size", "mixed_precision", "num_workers")}
    assert replace(row.training, **sized) == TrainSettings()
    assert row.prompts == PromptSettings()
    [expected], [found] = row.training.plan.values(), TrainSettings().plan.values()
    assert replace(expected, epochs=found.epochs) == found
    assert (found.learning_rate, found.head_learning_rate, found.pool_learning_rate) == (0.01, 0.01, 0.03)


def test_only_new_prompts_have_the_query_of_that_row():
    """A prompt file without the key "query" has the final query."""
    assert inspect.signature(LongTailPromptAdapter.wrap).parameters["query"].default == best_row().prompts.query
    assert LongTailPromptAdapter.wrap(tiny_vit(), 3).prompt_config.query == "block_k"
    assert PromptConfig(dim=8, depth=2, num_classes=3).query == "final"
    assert LongTailPromptAdapter.wrap(tiny_vit(), 3, placement="shallow").prompt_config.query == "final"
    with pytest.raises(ConfigError, match=r'shared_layers of at least 1, not 0.*Give query="final"'):
        LongTailPromptAdapter.wrap(tiny_vit(), 3, shared_layers=0)


FAMILIES = {"vpt_deep": "deep", "vpt_shallow": "shallow", "linear_probe": "probe_la", "full": "full"}


@pytest.mark.parametrize("optimizer", DEFAULT_RATES)
@pytest.mark.parametrize("method", METHODS)
def test_default_rates_are_the_best_of_the_tuning(method, optimizer):
    """Except prompts with SGD, whose rate is the paper's."""
    rate = learning_rates(PhaseSettings(), TrainSettings(method=method, optimizer=optimizer)).base
    if optimizer == "sgd" and method not in ("linear_probe", "full"):
        assert rate == 0.02
        return
    family, tuned = FAMILIES.get(method, "phase1_tokens"), {}
    for line in published():
        training = line["settings"]["training"]
        if line["row"].startswith(f"{family}.") and training["optimizer"] == optimizer and "validation" in line:
            tuned[training["shared"]["learning_rate"]] = line["validation"]["overall"]
    assert rate == max(tuned, key=tuned.get)


# -- learning rates ---------------------------------------------------------------------------------------

rates = st.none() | st.floats(1e-5, 10.0)


@given(
    st.sampled_from(METHODS),
    st.sampled_from(["joint", "decoupled", "shared"]),
    st.sampled_from(["adamw", "sgd"]),
    st.lists(rates, min_size=5, max_size=5),
)
def test_rates_are_resolved_in_the_plan_and_in_records(method, phases, optimizer, given_rates):
    base, head, group_base, group_head, pool = given_rates
    settings = TrainSettings(
        method=method,
        phases=phases,
        optimizer=optimizer,
        shared=PhaseSettings(learning_rate=base, head_learning_rate=head),
        group=PhaseSettings(learning_rate=group_base, head_learning_rate=group_head, pool_learning_rate=pool),
    )
    default = DEFAULT_RATES[optimizer][method]
    for name, phase in settings.plan.items():
        own, own_head = (group_base, group_head) if name == "group" else (base, head)
        expected = default if own is None else own
        if method == "linear_probe" and own_head is not None:  # nothing but the head is trained
            expected = own_head
        assert phase.learning_rate == expected
        factor = 10 if method == "full" else 1
        assert phase.head_learning_rate == (pytest.approx(factor * expected) if own_head is None else own_head)
        if name != "shared":
            assert phase.pool_learning_rate == (pytest.approx(3 * expected) if pool is None else pool)
    resolved = settings.resolved()
    assert resolved.plan == settings.plan
    assert resolved.resolved() == resolved
    assert TrainSettings.from_dict(json.loads(json.dumps(resolved.to_dict()))) == resolved
    assert all(phase.learning_rate is not None for name, phase in (("shared", resolved.shared),))


def test_another_method_does_not_take_the_rate_along():
    for method in METHODS:
        [phase] = replace(TrainSettings(), method=method).plan.values()
        assert phase.learning_rate == DEFAULT_RATES["adamw"][method]


def test_defaults_have_no_setting_without_effect():
    for method in METHODS:
        settings = TrainSettings(method=method)
        assert not list(unused_settings(settings))
        assert not [names for _, names in settings_without_effect(settings) if names]
        assert len(settings.plan) == 1


# -- runs -------------------------------------------------------------------------------------------------


def model_of(method):
    if method in ("linear_probe", "full"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return ViTClassifier.wrap(tiny_vit(), 3, method=method)
    placement = "shallow" if method == "vpt_shallow" else "deep"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LongTailPromptAdapter.wrap(tiny_vit(), 3, prompt_length=2, pool_size=4, placement=placement)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_the_defaults(method):
    dataset, labels = striped_data()
    model = model_of(method)
    settings = replace(FEW, method=method, shared=PhaseSettings(epochs=4))
    history = train(model, dataset, labels, settings, progress=False)
    assert {record["phase"] for record in history} == {"joint" if method == "lpt" else "shared"}
    assert history[-1]["loss"] < history[0]["loss"]
    if method != "full":  # its rate is for pretrained weights
        assert history[-1]["learning_rate"] < history[1]["learning_rate"]


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_run_with_the_defaults_resumes_to_the_last_bit(tmp_path, step):
    dataset, labels = striped_data()

    def result(folder, step=None):
        model = model_of("lpt")
        criterion = FailingLoss(step, epochs=2)
        train(model, RandomlyScaled(dataset), labels, FEW, criterion=criterion, checkpoints=folder, progress=False)
        return result_of(model)

    with pytest.raises(PowerCut):
        result(tmp_path, step)
    assert same(result(tmp_path), result(None))


def starts_of(monkeypatch, adapter, settings):
    """Values of shared prompt, keys and groups before the first step."""
    dataset, labels = striped_data()
    found = []
    monkeypatch.setattr(
        PhaseRun, "training_step", lambda run, *_: found.append(result_of(run.model)) or (_ for _ in ()).throw(PowerCut)
    )
    with pytest.raises(PowerCut):
        train(adapter, dataset, labels, settings, progress=False)
    return found[0]


def test_prompts_of_a_file_are_kept(monkeypatch, tmp_path):
    """Of all phases: the shared prompt; keys and groups, unless a phase before theirs changes the queries."""
    dataset, labels = striped_data()
    trained = model_of("lpt")
    train(trained, dataset, labels, FEW, progress=False)
    trained.save_pretrained(tmp_path)
    expected = trained.adapter_state_dict()
    for phases in ("joint", "decoupled"):
        with monkeypatch.context() as patch:
            loaded = LongTailPromptAdapter.from_pretrained(tmp_path, tiny_vit())
            assert loaded.trained_parts == dict.fromkeys(["shared", "pool"], f"as loaded from {tmp_path}")
            found = starts_of(patch, loaded, replace(FEW, phases=phases))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    with monkeypatch.context() as patch:
        loaded.trained_parts.clear()
        found = starts_of(patch, loaded, FEW)
    assert not torch.equal(found["shared.prompts"], expected["shared.prompts"])
    assert not torch.equal(found["pool.prompts"], expected["pool.prompts"])
    assert torch.equal(found["head.weight"], expected["head.weight"])


def test_a_file_of_phase_shared_keeps_the_shared_prompt_only(monkeypatch, tmp_path):
    dataset, labels = striped_data()
    trained = model_of("lpt")
    train(trained, dataset, labels, replace(FEW, phases="shared"), progress=False)
    assert trained.trained_parts == {"shared": "as trained before"}
    trained.save_pretrained(tmp_path)
    new = model_of("lpt")
    new.load_prompts(tmp_path, part="shared")
    for adapter in (LongTailPromptAdapter.from_pretrained(tmp_path, tiny_vit()), new):
        assert adapter.trained_parts == {"shared": f"as loaded from {tmp_path}"}
        with monkeypatch.context() as patch:
            found = starts_of(patch, adapter, FEW)
        assert torch.equal(found["shared.prompts"], trained.shared.prompts)
        assert not torch.equal(found["pool.prompts"], trained.pool.prompts)


def test_training_again_continues_and_a_second_phase_starts_groups(capsys):
    dataset, labels = striped_data()
    adapter = tiny_adapter(query="block_k")
    train(adapter, dataset, labels, replace(FEW, phases="shared"), progress=False)
    train(adapter, dataset, labels, FEW)
    text = capsys.readouterr().err
    assert "shared prompt as trained before; keys k-means centers of the queries; groups tokens of the images" in text
    train(adapter, dataset, labels, FEW)
    text = capsys.readouterr().err
    assert "shared prompt as trained before; keys as trained before; groups as trained before" in text
    train(adapter, dataset, labels, replace(FEW, phases="decoupled", group=PhaseSettings(epochs=1)))
    text = capsys.readouterr().err
    assert "shared prompt as trained before; keys k-means centers of the queries; groups tokens of the images" in text


def test_settings_of_one_phase_have_the_names_of_fields():
    """The messages of `settings_without_effect` name fields as flags do."""
    settings = TrainSettings(group=PhaseSettings(**{f.name: 0.5 for f in fields(PhaseSettings) if f.type != "int"}))
    found = dict(settings_without_effect(settings))['phase "joint" trains with the settings of shared']
    assert found == "group.learning_rate, group.head_learning_rate, group.weight_decay, group.momentum, group.warmup"


def in_double_precision():
    dataset, labels = striped_data(dtype=torch.float64)
    model = tiny_adapter(torch.float64, query="block_k", head_dropout=0.0)
    train(model, RandomlyScaled(dataset), labels, FEW, criterion=NoiseFreeLoss(2), progress=False)
    return result_of(model)


def test_two_processes_equal_a_single_process():
    first, second = run_ranks(in_double_precision, init=False)
    expected = in_double_precision()
    assert same(first, second)
    for name, tensor in expected.items():
        torch.testing.assert_close(first[name], tensor, atol=1e-9, rtol=1e-9, msg=name)
