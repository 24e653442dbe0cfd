"""Settings: JSON, invalid values, defaults, and the meaning of batch_size."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields, replace

import pytest
import torch

from lpt_peft.errors import ConfigError
from lpt_peft.recipe import (
    PhaseSettings,
    TrainSettings,
    fit,
    run_phase,
    train,
    warmup_cosine,
)
from tests.recipe.tiny import SETTINGS, striped_data, tiny_adapter


def test_settings_round_trip_through_json():
    settings = replace(SETTINGS, clip_norm=1.0, patience=3, shared=PhaseSettings(epochs=7, learning_rate=0.1))
    assert TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert TrainSettings.from_dict({}) == TrainSettings()
    assert list(replace(settings, phases="joint").plan) == ["joint"]
    assert list(replace(settings, phases="shared").plan) == ["shared"]
    assert list(replace(settings, shared=PhaseSettings(epochs=0)).plan) == ["group"]


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
        ({"phases": "both"}, "phases='both' must be one of joint, decoupled, shared"),
        ({"group": {"epochs": 0}}, 'group.epochs=0 does not leave the groups out of phases="joint"'),
        ({"shared": {"epochs": 0}}, 'shared.epochs=0 trains nothing with phases="joint"'),
        ({"shared": {"learning_rate": 0.0}}, "learning_rate=0.0 must be None, or above 0 and finite"),
        ({"keep": []}, "keep=[] must be one of last, best"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be from 0 to 2**63 - 1"),
        ({"num_workers": -1}, "num_workers=-1 must be None or at least 0"),
        ({"num_workers": 1.5}, "num_workers=1.5 must be int | None"),
        ({"compile": 1}, "compile=1 must be bool"),
        ({"backbone_dtype": "float64"}, "backbone_dtype='float64' must be one of float32, bfloat16, float16"),
        ({"patience": 0}, "patience=0 must be None or at least 1"),
        ({"save_every": 0}, "save_every=0 must be None or"),
        ({"optimizer": "adam"}, "optimizer='adam' must be one of adamw, sgd"),
        ({"weight_noise": float("inf")}, "weight_noise=inf must be at least 0 and finite"),
        ({"eta": float("inf")}, "eta=inf must be at least 0 and finite"),
        ({"clip_norm": float("inf")}, "clip_norm=inf must be None or above 0 and finite"),
        ({"group": {"head_learning_rate": 0.0}}, "head_learning_rate=0.0 must be None, or above 0 and finite"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8' must be None"),
    ],
)
def test_settings_refuse(values, words):
    with pytest.raises(ConfigError) as refusal:
        TrainSettings.from_dict(values)
    assert words in str(refusal.value)


def test_the_default_shot_rule_is_the_papers():
    for function in (fit, train):
        assert inspect.signature(function).parameters["shot_rule"].default == "lpt"


def test_batch_size_is_what_a_step_sees():
    """The learning rate follows the size of each half, as in the paper: 0.02 for 256 images in each half."""
    dataset, labels = striped_data()
    settings = TrainSettings(shared=PhaseSettings(epochs=1, warmup=0.0), batch_size=12, optimizer="sgd")
    sizes = []

    def criterion(output, target, epoch):
        sizes.append(len(target))
        return torch.nn.functional.cross_entropy(output.logits, target)

    phase = replace(settings.shared, learning_rate=0.5)
    history = run_phase(tiny_adapter(), dataset, labels, settings, phase, criterion=criterion, progress=False)
    assert sizes == [12] * (31 // 6 + 1)
    assert history[0]["learning_rate"] == pytest.approx(0.5 * 6 / 256 * warmup_cosine(5, 6, 0))


@pytest.mark.parametrize("kind", [TrainSettings, PhaseSettings])
@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_no_number_is_infinite_or_nan(kind, number):
    names = [field.name for field in fields(kind) if "float" in str(field.type)]
    assert names
    for name in names:
        with pytest.raises(ConfigError, match=f"{name}={number} must be"):
            kind(**{name: number})
