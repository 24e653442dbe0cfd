"""Summary of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.utils.data import TensorDataset

from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.recipe import PhaseSettings, TrainSettings, make_accelerator, train
from lpt_peft.recipe.summary import run_summary
from tests.recipe.tiny import (
    PHASE,
    SETTINGS,
    SHORT,
    striped_data,
    tiny_adapter,
)

SHARED_ONLY = replace(SHORT, group=replace(PHASE, epochs=0))


def run(settings=SHARED_ONLY, **options):
    dataset, labels = striped_data()
    return train(tiny_adapter(), dataset, labels, settings, **options)


def test_the_summary_of_a_run(capsys):
    run(replace(SETTINGS, shared=PHASE, group=replace(PHASE, epochs=2)))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:6] == [
        "Training: 31 images of 3 classes; largest class 0 (20), smallest class 2 (3)",
        "Phases: shared 4 epochs, group 2 epochs; 4 steps per epoch, 24 steps of 16 images (8 instance-balanced, 8 "
        "class-balanced)",
        "Learning rates: shared 2; group 2; SGD, times 0.03125 for 8 images in each half",
        "Starts: head as given; shared prompt as given; keys k-means centers of the queries; groups copies of the "
        "shared prompt",
        "Groups: selected by query final, in a second pass",
        "Device: cpu, float32; 1 process, 0 loading workers (automatic)",
    ]


def summary(settings=SETTINGS, labels=None, **options):
    dataset, own = striped_data()
    options = {"num_classes": 3, **options}
    return run_summary(dataset, labels or own, settings, make_accelerator(settings), **options)


def test_the_summary_names_classes_without_validation_images():
    dataset, _ = striped_data()
    images = TensorDataset(dataset.tensors[0][:28])
    validation = from_dataset(images, [0] * 20 + [1] * 8, ["ant", "bee", "cat"], allow_empty=True)
    text = summary(validation=validation)
    assert "Validation: 28 images of 3 classes; largest class ant (20), smallest class bee (8)\n" in text
    assert "note: 1 of 3 classes have no image here and do not affect its accuracy\n" in text
    assert "Validation: 31 images\n" in summary(validation=dataset)
    assert "1 class without an image" in summary(num_classes=4)


def test_the_summary_names_the_query():
    assert "Groups: selected by query block_k, in a single pass\n" in summary(query="block_k")
    assert "Groups" not in summary(SHARED_ONLY)


RATES = [
    ({}, "joint 0.01, groups 0.03; AdamW\n"),
    ({"optimizer": "sgd"}, "joint 0.02, groups 0.06; SGD, times 0.25 for 64 images in each half"),
    ({"phases": "shared"}, "shared 0.01; AdamW\n"),
    ({"phases": "decoupled", "shared": PhaseSettings(learning_rate=0.1)}, "shared 0.1; group 0.01, groups 0.03; AdamW"),
    ({"method": "full"}, "shared 0.0001, head 0.001; AdamW"),
    ({"method": "linear_probe", "optimizer": "sgd"}, "shared 0.6; SGD"),
]


@pytest.mark.parametrize(("changes", "line"), RATES)
def test_the_summary_names_the_learning_rates(changes, line):
    assert f"Learning rates: {line}" in summary(TrainSettings(**changes))


def test_the_summary_names_parts_that_are_kept():
    parts = {"shared": "as loaded from a", "pool": "as loaded from b"}
    start = "Starts: head as given; shared prompt as loaded from a; "
    assert f"{start}keys as loaded from b; groups as loaded from b" in summary(TrainSettings(), trained_parts=parts)
    text = summary(TrainSettings(), trained_parts={"shared": "as loaded from a"})
    assert f"{start}keys k-means centers of the queries; groups tokens of the images" in text
    text = summary(TrainSettings(phases="decoupled"), trained_parts=parts)  # phase "shared" changes the queries
    assert f"{start}keys k-means centers of the queries; groups tokens of the images" in text


def test_the_summary_notes_what_settings_do_not_do_literally(monkeypatch):
    text = summary(replace(SETTINGS, batch_size=128, shared=replace(PHASE, epochs=3), num_workers=3))
    assert "note: half a batch (64) is larger than the training set (31 images)" in text
    assert "note: phase shared has no warm-up: 5 % of its steps is less than a step" in text
    assert "1 process, 3 loading workers\n" in text
    phases = {"shared": replace(SETTINGS.shared, warmup=0.1), "group": replace(PHASE, warmup=0)}
    assert "note" not in summary(replace(SETTINGS, **phases))
    assert 'note: the given criterion replaces loss="lpt"' in summary(criterion=len)
    monkeypatch.setattr("lpt_peft.recipe.summary.MAX_QUERIES", 30)
    assert "keys and groups start from the queries of at most 30 evenly spaced images" in summary()
    assert "k-means" not in summary(replace(SETTINGS, group=replace(PHASE, epochs=0)))
    assert "instance-balanced)" in summary(replace(SETTINGS, sampling="instance", loss="agcl"))
    assert "backbone cast to bfloat16" in summary(replace(SETTINGS, backbone_dtype="bfloat16"))


WITHOUT_EFFECT = {
    "groups": (
        {"init_keys": "random", "decay": "selected", "group": PhaseSettings(epochs=0)},
        "init_keys, init_groups, decay: no effect, because no phase trains groups",
    ),
    "phase 1 alone": (
        {"phases": "shared", "init_groups": "tokens", "group": PhaseSettings(epochs=0)},
        "group.epochs: no effect, because no phase trains groups",
    ),
    "rate": (
        {"shared": replace(PHASE, pool_learning_rate=3.0)},
        "shared.pool_learning_rate: no effect, because the rate of the group prompts is group.pool_learning_rate",
    ),
    "baseline rate": (
        {"method": "vpt_deep", "shared": replace(PHASE, pool_learning_rate=3.0)},
        "shared.pool_learning_rate: no effect, because the rate of the group prompts is group.pool_learning_rate",
    ),
    "probe": (
        {"method": "linear_probe", "shared": PhaseSettings(learning_rate=1.0, head_learning_rate=2.0)},
        'shared.learning_rate: no effect, because method="linear_probe" trains with the rate of the head',
    ),
    "joint": (
        {"phases": "joint", "group": PhaseSettings(learning_rate=1.0, pool_learning_rate=3.0)},
        'group.learning_rate: no effect, because phase "joint" trains with the settings of shared',
    ),
    "eta": ({"loss": "agcl", "eta": 0.25}, 'eta: no effect, because loss="agcl" does not weight the halves'),
    "draws": (
        {"loss": "agcl", "sampling": "instance", "samples_per_class": 1},
        'samples_per_class: no effect, because sampling="instance" draws no class-balanced images',
    ),
}


@pytest.mark.parametrize(("changes", "note"), WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_settings_without_effect_are_named(changes, note):
    assert f"note: {note}" in summary(replace(SETTINGS, **changes))
    for settings in (SETTINGS, TrainSettings()):
        assert "no effect" not in summary(settings)
