"""PromptConfig: ranges, shapes, round trip."""

from __future__ import annotations

import dataclasses

import pytest

from lpt_peft import PromptConfig
from lpt_peft.errors import ConfigError

SIZES = {"dim": 768, "depth": 12, "num_classes": 365}


def test_defaults_and_shapes():
    config = PromptConfig(**SIZES)
    assert (config.shared_layers, config.feature_dim, config.group_layers) == (6, 768, 6)
    assert config.tensor_shapes == {
        "shared.prompts": (12, 10, 768),
        "pool.prompts": (20, 6, 10, 768),
        "pool.keys": (20, 768),
        "head.weight": (365, 768),
    }
    assert PromptConfig(**SIZES, feature_dim=512).tensor_shapes["pool.keys"] == (20, 512)


def test_round_trip_and_frozen():
    config = PromptConfig(**SIZES, shared_layers=0, top_k=20, logit_scale=30)
    assert PromptConfig.from_dict(config.to_dict()) == config
    assert isinstance(config.logit_scale, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 0}, "dim=0 must be at least 1"),
        ({"depth": "12"}, "depth='12' must be an integer"),
        ({"depth": True}, "depth=True must be an integer"),
        ({"num_classes": 1_000_001}, "num_classes=1000001 must be from 1 to 1000000"),
        ({"shared_layers": 12}, "shared_layers=12 must be from 0 to 11"),
        ({"top_k": 21}, "top_k=21 must be from 1 to 20"),
        ({"logit_scale": True}, "logit_scale=True"),
        ({"logit_scale": float("inf")}, "logit_scale=inf"),
        ({"color": 1}, "Unknown key.*color"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ConfigError, match=words):
        PromptConfig.from_dict({**SIZES, **change})


def test_missing_key():
    with pytest.raises(ConfigError, match="num_classes"):
        PromptConfig.from_dict({"dim": 1, "depth": 1})
