"""What a run is told besides the steps: validation, early stop, losses by name, trackers, settings, presets."""

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
from lpt_peft.metrics import SHOT_RULES
from lpt_peft.recipe import PRESETS, Parts, PhaseSettings, TrainSettings, evaluate, fit, preset, train
from lpt_peft.recipe.training.criteria import criterion_of
from tests.recipe.tiny import COUNTS, PHASE, SETTINGS, noisy_validation, result_of, same, striped_data, tiny_adapter

ONE = replace(SETTINGS, group=replace(PHASE, epochs=0))


def lone_epochs(settings, dataset, labels, validation):
    """What training for 1, 2, ... epochs would say, taken by watching one run from outside."""
    seen = []

    class Watched(TensorDataset):
        def __getitem__(self, index):
            if index == 0:
                seen.append(result_of(adapter))
            return super().__getitem__(index)

    adapter = tiny_adapter()
    history = train(adapter, dataset, labels, settings, validation=Watched(*validation.tensors), progress=False)
    return adapter, history, seen


@pytest.mark.parametrize("average", [None, 0.5])
def test_the_best_epoch_on_validation_is_kept(average):
    dataset, labels = striped_data()
    validation = noisy_validation()
    settings = replace(ONE, shared=replace(PHASE, epochs=8), keep="best", average=average)
    adapter, history, seen = lone_epochs(settings, dataset, labels, validation)
    scores = [record["validation"]["overall"] for record in history]
    best = scores.index(max(scores))
    assert 0 < best < 7, "else the test proves nothing"
    assert same(result_of(adapter), seen[best])
    assert evaluate(adapter, validation, ShotMetrics(COUNTS)).balanced_accuracy == scores[best]
    last, _, seen = lone_epochs(replace(settings, keep="last"), dataset, labels, validation)
    assert same(result_of(last), seen[-1])


def test_patience_ends_the_phase():
    dataset, labels = striped_data()
    settings = replace(SETTINGS, shared=replace(PHASE, epochs=8), patience=2)
    history = train(tiny_adapter(), dataset, labels, settings, validation=noisy_validation(), progress=False)
    scores = [record["validation"]["overall"] for record in history if record["phase"] == "shared"]
    best = scores.index(max(scores))
    assert len(scores) == best + 3 < 8
    assert [record["phase"] for record in history][-1] == "group", "the next phase begins all the same"


def test_of_equal_validations_the_first_is_the_best():
    dataset, labels = striped_data()
    still = replace(ONE, shared=replace(PHASE, epochs=6, learning_rate=1e-9), keep="best")
    adapter, history, seen = lone_epochs(still, dataset, labels, noisy_validation())
    assert len({record["validation"]["overall"] for record in history}) == 1
    assert same(result_of(adapter), seen[0])
    assert not same(seen[0], seen[5])
    history = train(
        tiny_adapter(), dataset, labels, replace(still, patience=2), validation=noisy_validation(), progress=False
    )
    assert len(history) == 3


def test_validation_changes_nothing_of_what_is_learnt_and_may_be_rare():
    dataset, labels = striped_data()
    plain, watched = tiny_adapter(), tiny_adapter()
    train(plain, dataset, labels, ONE, progress=False)
    settings = replace(ONE, validate_every=3)
    history = train(watched, dataset, labels, settings, validation=striped_data(1)[0], progress=False)
    assert same(result_of(plain), result_of(watched))
    assert ["validation" in record for record in history] == [False, False, True, True]


def test_history_and_results_have_the_same_rule(tmp_path):
    dataset, labels = striped_data()
    parts = Parts(from_dataset(dataset, labels), striped_data(1)[0])
    fit(tiny_adapter(), parts, ONE, tmp_path, shot_rule="lpt", progress=False)
    last = json.loads((tmp_path / "history.json").read_text())[-1]["validation"]
    result = json.loads((tmp_path / "results.json").read_text())["validation"]
    assert last == {name: result[name] for name in last}
    assert last["medium"] is None


@pytest.mark.parametrize("change", [{"keep": "best"}, {"patience": 3}])
def test_choosing_needs_a_validation_part(change):
    dataset, labels = striped_data()
    with pytest.raises(ConfigError, match="neither trained on nor tested on"):
        train(tiny_adapter(), dataset, labels, replace(ONE, **change), progress=False)


def test_named_losses():
    generator = torch.Generator().manual_seed(0)
    labels = [0, 0, 0, 1, 1, 2]
    adapter = tiny_adapter()
    output = adapter(torch.randn(6, 3, 32, 32, generator=generator), return_output=True)
    target = torch.tensor(labels)
    plain = torch.nn.functional.cross_entropy(output.logits, target)
    instance = {"sampling": "instance"}
    settings = TrainSettings(loss="cross_entropy", **instance)
    torch.testing.assert_close(criterion_of(settings, 4, labels, adapter.head)(output, target, 0), plain)
    adapter.phase = "group"
    output = adapter(torch.randn(6, 3, 32, 32, generator=generator), return_output=True)
    match = 1 - output.similarity.mean()
    plain = torch.nn.functional.cross_entropy(output.logits, target)
    torch.testing.assert_close(criterion_of(settings, 4, labels, adapter.head)(output, target, 0), plain + match)
    agcl = criterion_of(TrainSettings(loss="agcl", **instance), 4, labels, adapter.head)
    agcl.eval()
    wanted = AGCLLoss([3, 2, 1], scale=20.0).eval()(output.logits, target) + match
    torch.testing.assert_close(agcl(output, target, 0), wanted)


@pytest.mark.parametrize("loss", ["agcl", "cross_entropy"])
def test_keys_learn_under_every_loss(loss):
    dataset, labels = striped_data()
    adapter = tiny_adapter()
    settings = replace(SETTINGS, loss=loss, sampling="instance", shared=replace(PHASE, epochs=0), init_keys="random")
    before = adapter.pool.keys.clone()
    train(adapter, dataset, labels, replace(settings, group=replace(PHASE, weight_decay=0.0)), progress=False)
    assert not torch.equal(adapter.pool.keys, before)


class Notebook(GeneralTracker):
    name = "notebook"
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


def test_trackers_of_accelerate_are_told():
    notebook = Notebook()
    accelerator = Accelerator(cpu=True, log_with=notebook)
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
    assert [step for step, _ in notebook.lines] == list(range(1, 9))
    assert notebook.lines[0][1]["shared/loss"] == history[0]["loss"]
    assert notebook.lines[-1][1]["group/overall"] == history[-1]["validation"]["overall"]


def test_settings_survive_json():
    settings = replace(SETTINGS, clip_norm=1.0, patience=3, shared=PhaseSettings(epochs=7))
    assert TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert TrainSettings.from_dict({}) == TrainSettings()
    assert list(replace(settings, phases="joint").plan) == ["joint"]
    assert list(TrainSettings(shared=PhaseSettings(epochs=0)).plan) == ["group"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batchsize": 3}, "TrainSettings has no batchsize; known are accumulate, average, backbone_dtype"),
        ({"shared": {"lr": 3}}, "PhaseSettings has no lr"),
        ({"shared": 3}, "PhaseSettings needs names and values, not 3"),
        ({"batch_size": "eight"}, "batch_size='eight' must be int"),
        ({"batch_size": 8.0}, "batch_size=8.0 must be int"),
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


def test_presets_say_what_the_paper_says():
    """method.md, sections 7 and 8: the figures stand here a second time, on purpose."""
    assert set(PRESETS) == {"paper", "places_lt", "cifar100_lt", "inat2018"}
    for name, known in PRESETS.items():
        epochs = 80 if name == "inat2018" else 40
        for phase in (known.settings.shared, known.settings.group):
            assert (phase.epochs, phase.learning_rate, phase.weight_decay, phase.momentum) == (epochs, 0.02, 0.01, 0.9)
        assert (known.settings.samples_per_class, known.settings.eta) == (4, 0.5)
        assert (known.settings.init_keys, known.settings.init_groups) == ("random", "random")
        assert "2210.01033" in known.source
        assert known.shot_rule in SHOT_RULES
    assert "50.07" in PRESETS["places_lt"].expected
    with pytest.raises(ConfigError, match="no preset 'imagenet'; there are paper, places_lt"):
        preset("imagenet")
