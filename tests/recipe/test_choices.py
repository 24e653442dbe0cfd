"""Settings beyond the steps: validation, early stopping, losses by name, trackers, presets."""

from __future__ import annotations

import inspect
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
from lpt_peft.metrics import SHOT_RULES
from lpt_peft.recipe import (
    PRESETS,
    PhaseSettings,
    Splits,
    TrainSettings,
    evaluate,
    fit,
    preset,
    run_phase,
    train,
    warmup_cosine,
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


def test_settings_round_trip_through_json():
    settings = replace(SETTINGS, clip_norm=1.0, patience=3, shared=PhaseSettings(epochs=7))
    assert TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert TrainSettings.from_dict({}) == TrainSettings()
    assert list(replace(settings, phases="joint").plan) == ["joint"]
    assert list(TrainSettings(shared=PhaseSettings(epochs=0)).plan) == ["group"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batchsize": 3}, "TrainSettings has no batchsize; the fields are accumulate, average, backbone_dtype"),
        ({"shared": {"lr": 3}}, "PhaseSettings has no lr"),
        ({"shared": 3}, "PhaseSettings needs a mapping of names to values, not 3"),
        ({"batch_size": "eight"}, "batch_size='eight' must be int"),
        ({"batch_size": 8.0}, "batch_size=8.0 must be int"),
        ({"batch_size": 7}, "batch_size=7 must be even"),
        ({"seed": True}, "seed=True must be int"),
        ({"clip_norm": "1"}, "clip_norm='1' must be float | None"),
        ({"shared": {"epochs": "3"}}, "PhaseSettings: epochs='3' must be int"),
        ({"accumulate": 0, "seed": -1}, "TrainSettings: accumulate=0 must be at least 1; seed=-1 must be from 0 to"),
        ({"average": 1.0}, "average=1.0 must be None or above 0 and below 1"),
        ({"phases": "both"}, "phases='both' must be one of decoupled, joint"),
        ({"keep": []}, "keep=[] must be one of last, best"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be from 0 to 2**63 - 1"),
        ({"num_workers": -1}, "num_workers=-1 must be None or at least 0"),
        ({"num_workers": 1.5}, "num_workers=1.5 must be int | None"),
        ({"compile": 1}, "compile=1 must be bool"),
        ({"backbone_dtype": "float64"}, "backbone_dtype='float64' must be one of float32, bfloat16, float16"),
        ({"patience": 0}, "patience=0 must be None or at least 1"),
        ({"save_every": 0}, "save_every=0 must be None or"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8' must be None"),
    ],
)
def test_settings_refuse(values, words):
    with pytest.raises(ConfigError) as refusal:
        TrainSettings.from_dict(values)
    assert words in str(refusal.value)


def test_presets_have_the_values_of_the_paper():
    """The values of the paper, written here a second time on purpose."""
    assert set(PRESETS) == {"paper", "inat2018"}
    for name, epochs in (("paper", 40), ("inat2018", 80)):
        known = preset(name)
        for phase in (known.settings.shared, known.settings.group):
            assert (phase.epochs, phase.learning_rate, phase.weight_decay, phase.momentum) == (epochs, 0.02, 0.01, 0.9)
        assert (known.settings.samples_per_class, known.settings.eta) == (4, 0.5)
        assert (known.settings.init_keys, known.settings.init_groups) == ("random", "random")
        assert known.shot_rule == "lpt"
        assert known.shot_rule in SHOT_RULES
        assert f"{epochs} + {epochs} epochs" in known.source
        assert "2210.01033" in str(known)
        assert known.expected in str(known)
    for value in ("50.07", "49.27", "52.31", "46.88", "89.1, 90.0 and 91.0"):
        assert value in PRESETS["paper"].expected
    assert PRESETS["inat2018"].expected == "iNaturalist 2018 76.1 (few 79.3)"
    with pytest.raises(ConfigError, match="no preset 'places_lt'; the presets are paper, inat2018. Places-LT and"):
        preset("places_lt")


def test_the_default_shot_rule_is_the_papers():
    for function in (fit, train):
        assert inspect.signature(function).parameters["shot_rule"].default == "lpt"


def test_batch_size_is_what_a_step_sees():
    """The learning rate follows the size of each half, as in the paper: 0.02 for 256 images in each half."""
    dataset, labels = striped_data()
    settings = TrainSettings(shared=PhaseSettings(epochs=1, warmup=0.0), batch_size=12)
    sizes = []

    def criterion(output, target, epoch):
        sizes.append(len(target))
        return torch.nn.functional.cross_entropy(output.logits, target)

    phase = replace(settings.shared, learning_rate=0.5)
    history = run_phase(tiny_adapter(), dataset, labels, settings, phase, criterion=criterion, progress=False)
    assert sizes == [12] * (31 // 6 + 1)
    assert history[0]["learning_rate"] == pytest.approx(0.5 * 6 / 256 * warmup_cosine(5, 6, 0))
