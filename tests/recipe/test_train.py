"""train: validation, early stopping, losses by name, trackers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from torch.utils.data import TensorDataset

from lpt_peft import AGCLLoss, ShotMetrics
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.errors import ConfigError
from lpt_peft.recipe import (
    Splits,
    TrainSettings,
    evaluate,
    fit,
    train,
)
from lpt_peft.recipe.training.criteria import build_criterion
from tests.recipe.tiny import COUNTS, PHASE, SETTINGS, noisy_validation, result_of, same, striped_data, tiny_adapter

SHARED_ONLY = replace(SETTINGS, group=replace(PHASE, epochs=0))


def watched_epochs(settings, dataset, labels, validation):
    """Train, and record the parameters at every validation."""
    seen = []

    class Recording(TensorDataset):
        def __getitem__(self, index):
            if index == 0:
                seen.append(result_of(adapter))
            return super().__getitem__(index)

    adapter = tiny_adapter()
    history = train(adapter, dataset, labels, settings, validation=Recording(*validation.tensors), progress=False)
    return adapter, history, seen[1:]  # the first read is the check before training


@pytest.mark.parametrize("average", [None, 0.5])
def test_the_best_epoch_on_validation_is_kept(average):
    dataset, labels = striped_data()
    validation = noisy_validation()
    settings = replace(SHARED_ONLY, shared=replace(PHASE, epochs=8), keep="best", average=average)
    adapter, history, seen = watched_epochs(settings, dataset, labels, validation)
    scores = [record["validation"]["overall"] for record in history]
    best = scores.index(max(scores))
    assert 0 < best < 7, "otherwise the test cannot fail"
    assert same(result_of(adapter), seen[best])
    assert evaluate(adapter, validation, ShotMetrics(COUNTS)).balanced_accuracy == scores[best]
    last, _, seen = watched_epochs(replace(settings, keep="last"), dataset, labels, validation)
    assert same(result_of(last), seen[-1])


def test_patience_ends_the_phase():
    dataset, labels = striped_data()
    settings = replace(SETTINGS, shared=replace(PHASE, epochs=8), patience=2)
    history = train(tiny_adapter(), dataset, labels, settings, validation=noisy_validation(), progress=False)
    scores = [record["validation"]["overall"] for record in history if record["phase"] == "shared"]
    best = scores.index(max(scores))
    assert len(scores) == best + 3 < 8
    assert [record["phase"] for record in history][-1] == "group", "the next phase is trained"


def test_the_first_of_equal_validations_is_the_best():
    dataset, labels = striped_data()
    constant = replace(SHARED_ONLY, shared=replace(PHASE, epochs=6, learning_rate=1e-9), keep="best")
    adapter, history, seen = watched_epochs(constant, dataset, labels, noisy_validation())
    assert len({record["validation"]["overall"] for record in history}) == 1
    assert same(result_of(adapter), seen[0])
    assert not same(seen[0], seen[5])
    history = train(
        tiny_adapter(), dataset, labels, replace(constant, patience=2), validation=noisy_validation(), progress=False
    )
    assert len(history) == 3


def test_validation_does_not_change_the_result_and_may_be_rare():
    dataset, labels = striped_data()
    plain, watched = tiny_adapter(), tiny_adapter()
    train(plain, dataset, labels, SHARED_ONLY, progress=False)
    settings = replace(SHARED_ONLY, validate_every=3)
    history = train(watched, dataset, labels, settings, validation=striped_data(1)[0], progress=False)
    assert same(result_of(plain), result_of(watched))
    assert ["validation" in record for record in history] == [False, False, True, True]


def test_history_and_results_have_the_same_rule(tmp_path):
    dataset, labels = striped_data()
    splits = Splits(from_dataset(dataset, labels), striped_data(1)[0])
    fit(tiny_adapter(), splits, SHARED_ONLY, tmp_path, shot_rule="lpt", progress=False)
    last = json.loads((tmp_path / "history.json").read_text())[-1]["validation"]
    result = json.loads((tmp_path / "results.json").read_text())["validation"]
    assert last == {name: result[name] for name in last}
    assert last["medium"] is None


@pytest.mark.parametrize("change", [{"keep": "best"}, {"patience": 3}])
def test_keep_best_and_patience_need_a_validation_split(change):
    dataset, labels = striped_data()
    with pytest.raises(ConfigError, match="neither trained on nor tested on"):
        train(tiny_adapter(), dataset, labels, replace(SHARED_ONLY, **change), progress=False)


def test_named_losses():
    generator = torch.Generator().manual_seed(0)
    labels = [0, 0, 0, 1, 1, 2]
    adapter = tiny_adapter()
    output = adapter(torch.randn(6, 3, 32, 32, generator=generator), return_output=True)
    target = torch.tensor(labels)
    plain = torch.nn.functional.cross_entropy(output.logits, target)
    instance = {"sampling": "instance"}
    settings = TrainSettings(loss="cross_entropy", **instance)
    torch.testing.assert_close(build_criterion(settings, 4, labels, adapter.head)(output, target, 0), plain)
    adapter.phase = "group"
    output = adapter(torch.randn(6, 3, 32, 32, generator=generator), return_output=True)
    match = 1 - output.similarity.mean()
    plain = torch.nn.functional.cross_entropy(output.logits, target)
    torch.testing.assert_close(build_criterion(settings, 4, labels, adapter.head)(output, target, 0), plain + match)
    agcl = build_criterion(TrainSettings(loss="agcl", **instance), 4, labels, adapter.head)
    agcl.eval()
    expected = AGCLLoss([3, 2, 1], scale=20.0).eval()(output.logits, target) + match
    torch.testing.assert_close(agcl(output, target, 0), expected)


@pytest.mark.parametrize("loss", ["agcl", "cross_entropy"])
def test_keys_are_trained_with_every_loss(loss):
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    settings = replace(SETTINGS, loss=loss, sampling="instance", shared=replace(PHASE, epochs=0), init_keys="random")
    before = adapter.pool.keys.clone()
    train(adapter, dataset, labels, replace(settings, group=replace(PHASE, weight_decay=0.0)), progress=False)
    assert not torch.equal(adapter.pool.keys, before)


class RecordingTracker(GeneralTracker):
    name = "recording"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.lines = []

    @property
    def tracker(self):
        return self.lines

    @on_main_process
    def store_init_configuration(self, values):
        pass

    @on_main_process
    def log(self, values, step=None, **options):
        self.lines.append((step, values))


def test_accelerate_trackers_receive_every_epoch():
    tracker = RecordingTracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("lpt_peft")
    dataset, labels = striped_data()
    history = train(
        tiny_adapter(),
        dataset,
        labels,
        SETTINGS,
        validation=striped_data(1)[0],
        accelerator=accelerator,
        progress=False,
    )
    assert [step for step, _ in tracker.lines] == list(range(1, 9))
    assert tracker.lines[0][1]["shared/loss"] == history[0]["loss"]
    assert tracker.lines[-1][1]["group/overall"] == history[-1]["validation"]["overall"]
