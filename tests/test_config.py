"""PromptConfig: ranges, shapes, round trip."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from lpt_peft import PromptConfig
from lpt_peft.config import PromptMetadata
from lpt_peft.errors import ConfigError, InputError

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


def test_metadata_sorts_mappings_by_label():
    metadata = PromptMetadata(class_counts=Counter([1, 0, 1, 2, 1]), label_names={"c": 2, "a": 0, "b": 1})
    assert metadata == PromptMetadata(class_counts=(1, 3, 1), label_names=("a", "b", "c"))
    by_name = PromptMetadata(class_counts={"c": 1, "a": 1, "b": 3}, label_names={"1": "b", "0": "a", "2": "c"})
    assert by_name == metadata
    assert PromptMetadata(class_counts=torch.tensor([1, 3, 1]), label_names=["a", "b", "c"]) == metadata
    assert PromptMetadata(label_names=["crane", "crane"]).label_names == ("crane", "crane")  # as in ImageNet


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"class_counts": {0: 5, 2: 3}}, "class_counts is a dict .* missing 1, out of range 2"),
        ({"class_counts": {"a": 5, "b": 3}}, "class_counts has 'a' where an integer label is needed"),
        ({"class_counts": {5, 3}}, "class_counts is a set"),
        ({"class_counts": [1.5]}, "class_counts must be one integer per class"),
        ({"label_names": {"a", "b"}}, "label_names is a set"),
        ({"label_names": "ab"}, "label_names must be one string per class"),
        ({"label_names": {0: "a", 2: "b"}}, "missing 1, out of range 2"),
    ],
)
def test_metadata_without_a_known_order(values, words):
    with pytest.raises(InputError, match=words):
        PromptMetadata(**values)
