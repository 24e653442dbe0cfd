"""Presets: the values of their sources."""

from __future__ import annotations

import pytest

from lpt_peft.errors import ConfigError
from lpt_peft.metrics import SHOT_RULES
from lpt_peft.recipe import (
    PRESETS,
    preset,
)


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


def test_the_paper_preset_in_every_field():
    """So that no default of another source becomes part of it; learning rates are those that the run uses."""
    phase = {"epochs": 40, "learning_rate": 0.02, "head_learning_rate": 0.02, "weight_decay": 0.01, "momentum": 0.9}
    phase["warmup"] = 0.05  # the paper: short
    expected = {
        "method": "lpt",
        "shared": {**phase, "pool_learning_rate": None},
        "group": {**phase, "pool_learning_rate": 0.02},
        "phases": "decoupled",
        "sampling": "dual",
        "samples_per_class": 4,
        "loss": "lpt",
        "eta": 0.5,
        "optimizer": "sgd",
        **{f"init_{part}": "random" for part in ("prompts", "head", "keys", "groups")},
        "decay": "all",
        "keep": "last",
        "tau": 1.0,
        **dict.fromkeys(["query_regularizer", "weight_noise"], 0.0),
        **dict.fromkeys(["average", "clip_norm", "reweight_from"]),
    }
    # What concerns the machine, or the size of a step, which scales the learning rate.
    free = {"batch_size", "accumulate", "mixed_precision", "backbone_dtype", "compile", "patience", "validate_every"}
    free |= {"save_every", "keep_checkpoints", "num_workers", "seed"}
    known = preset("paper")
    found = known.settings.resolved().to_dict()
    assert {name: value for name, value in found.items() if name not in free} == expected
    assert known.query == "final"
