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
