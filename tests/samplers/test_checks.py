"""Input validation of the samplers."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from lpt_peft.errors import ConfigError, InputError, LPTError
from tests.samplers.draws import make_dual, make_single, makers


@makers
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"labels": []}, InputError, "labels are empty"),
        ({"labels": torch.zeros(0, dtype=torch.long)}, InputError, "labels are empty"),
        ({"labels": [4, 4, 4]}, InputError, r"single class \(4\).*RandomSampler"),
        ({"labels": [0, 1, -1]}, InputError, r"at least 0, but labels\[2\] is -1"),
        ({"labels": [0.0, 1.0]}, InputError, r"integers, not float64: convert them with labels\.astype\(int\)"),
        ({"labels": [0.0, 1.0, math.nan]}, InputError, r"float64: remove images without a label \(1\)"),
        ({"labels": [[0], [1]]}, InputError, r"not of shape \(2, 1\): pass labels\[:, 0\]"),
        ({"labels": {0: 1, 1: 0}}, InputError, "labels is a dict: pass a list.*in the order of the images"),
        ({"labels": Counter([0, 1])}, InputError, "labels is a Counter: pass a list"),
        ({"labels": {0, 1}}, InputError, "labels is a set: pass a list"),
        ({"labels": {"a": 0, "b": 1}.values()}, InputError, "labels is a dict_values: pass a list"),
        ({"labels": (label for label in (0, 1))}, InputError, "labels is a generator: pass a list"),
        ({"labels": "01"}, InputError, "labels is a str: pass a list"),
        ({"labels": b"01"}, InputError, "labels is a bytes: pass a list"),
        ({"labels": [0, None]}, InputError, r"labels\[1\]=None must be an integer.*remove unlabeled"),
        ({"labels": [0, 2**70]}, InputError, r"labels\[1\]=1180591620717411303424 is too large: encode"),
        (
            {"labels": np.array([0, 2**63], dtype=np.uint64)},
            InputError,
            r"labels\[1\]=9223372036854775808 is too",
        ),
        (
            {"labels": np.array([0, "a"], dtype=object)},
            InputError,
            r"labels\[1\]='a' must be an integer of at least 0\. Encode the classes as integers from 0",
        ),
        ({"labels": np.array([0, True], dtype=object)}, InputError, r"labels\[1\]=True must be an integer"),
        ({"labels": np.ma.array([0, 1, 1], mask=[0, 0, 1])}, InputError, "masked entries: remove unlabeled"),
        ({"labels": np.array(["2020-01-01"], dtype="datetime64[D]")}, InputError, "not datetime64.*encode the classes"),
        ({"labels": torch.tensor([0, 1], device="meta")}, InputError, "labels cannot be converted"),
        ({"labels": torch.tensor([0, 1]).to_sparse()}, InputError, "labels cannot be converted.*to_dense"),
        ({"labels": torch.tensor([0.5, 1.0])}, InputError, r"not float32: convert them with labels\.long\(\)"),
        ({"labels": [True, False]}, InputError, "integers, not bool"),
        ({"labels": ["cat", "dog"]}, InputError, "integers, not <U3.*encode"),
        (
            {"labels": [[0, 1], [1, 0]]},
            InputError,
            r"not of shape \(2, 2\): for one-hot rows, .*argmax",
        ),
        ({"labels": [[0, 1], [1]]}, InputError, "labels cannot be converted"),
        ({"labels": 3}, InputError, "one-dimensional"),
        ({"labels": None}, InputError, "one-dimensional"),
        ({"labels": TensorDataset(torch.arange(4))}, InputError, r"dataset \(TensorDataset\).*targets"),
        ({"samples_per_class": 0}, ConfigError, "samples_per_class=0.*at least 1"),
        ({"samples_per_class": 1.5}, ConfigError, "samples_per_class=1.5"),
        ({"seed": -1}, ConfigError, "seed=-1.*at least 0"),
        ({"seed": None}, ConfigError, "seed=None"),
        ({"num_replicas": 2, "rank": 2}, ConfigError, "rank=2.*from 0 to 1"),
        ({"num_replicas": 2, "rank": -1}, ConfigError, "rank=-1.*from 0 to 1"),
        ({"num_replicas": 0, "rank": 0}, ConfigError, "num_replicas=0.*at least 1"),
        ({"num_replicas": 2}, ConfigError, "num_replicas=2 and rank=None.*both"),
        ({"rank": 1}, ConfigError, "num_replicas=None and rank=1.*both"),
    ],
)
def test_invalid_arguments(make, changes, error, words):
    with pytest.raises(error, match=words) as caught:
        make(**changes)
    assert isinstance(caught.value, LPTError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (make_dual, {"batch_size": 0}, "batch_size=0.*at least 2"),
        (make_dual, {"batch_size": 1}, "batch_size=1.*at least 2"),
        (make_dual, {"batch_size": 7}, "batch_size=7 must be even.*use 6 or 8"),
        (make_dual, {"batch_size": True}, "batch_size=True"),
        (make_dual, {"batch_size": "8"}, "batch_size='8'"),
        (make_dual, {"num_batches": 0}, "num_batches=0.*at least 1"),
        (make_single, {"num_samples": 0}, "num_samples=0.*at least 1"),
        (make_single, {"num_samples": 2.0}, "num_samples=2.0"),
    ],
)
def test_invalid_sizes(make, changes, words):
    with pytest.raises(ConfigError, match=words):
        make(**changes)


@makers
def test_invalid_epoch_and_position(make):
    sampler = make()
    for epoch in (-1, 0.5, None):
        with pytest.raises(ConfigError, match=r"epoch=.*at least 0"):
            sampler.set_epoch(epoch)
    for position in (-1, len(sampler) + 1, 0.5):
        with pytest.raises(ConfigError, match=rf"position=.*from 0 to {len(sampler)}"):
            sampler.state_dict(position=position)
