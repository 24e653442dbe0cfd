"""Both losses as modules: copies, state, compilation and assigned settings."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lpt_peft.errors import ConfigError, InputError
from lpt_peft.losses import AGCLLoss, LPTLoss
from tests.losses.oracle import COUNTS, Output, batch


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(training):
    torch._dynamo.reset()
    logits, target, noise = batch(8, dtype=torch.float32)
    loss = AGCLLoss(COUNTS, gamma_pos=0.5).train(training)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, target, noise), loss(logits, target, noise))
    assert compiled(logits, target).isfinite()

    output = Output(logits, torch.rand(8, 2))
    objective = LPTLoss(COUNTS, 10).train(training)
    compiled = torch.compile(objective, fullgraph=True, backend="eager")
    for epoch in (0, 1, 2, 3, 2.5):
        torch.testing.assert_close(compiled(output, target, epoch, noise), objective(output, target, epoch, noise))
    assert compiled(output, target, 0).isfinite()
    assert compiled(Output(logits, torch.rand(8, 0)), target, 0).isfinite()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies_and_state(clone):
    logits, target, noise = batch(8)
    output = Output(logits, torch.rand(8, 2))
    loss = LPTLoss(torch.tensor(COUNTS), 10, eta=0.7, margin=0.2)
    assert torch.equal(clone(loss)(output, target, 3, noise), loss(output, target, 3, noise))
    assert not loss.state_dict()
    assert not list(loss.parameters())
    assert {buffer.device.type for buffer in loss.to("meta").buffers()} == {"meta"}


def test_counts_are_copied_and_shown():
    counts = torch.tensor(COUNTS)
    loss = AGCLLoss(counts, margin=0.25)
    counts.zero_()
    assert loss.class_counts.tolist() == COUNTS
    assert AGCLLoss([70_001, 3]).half().class_counts.tolist() == [70_001, 3]
    assert "num_classes=6, scale=20.0, margin=0.25" in repr(loss)


@pytest.mark.parametrize(
    "change", [{"normalize": False}, {"margin": 0.3}, {"class_counts": [3, 3, 2, 50, 7, 1]}, {"gamma_neg": 2.0}]
)
def test_assigned_settings_take_effect(change):
    logits, target, noise = batch(8)
    output = Output(logits, torch.zeros(8, 0))
    for loss, inputs in (
        (AGCLLoss(COUNTS, noise_scale=0.05), (logits, target, noise)),
        (LPTLoss(COUNTS, 3, noise_scale=0.05), (output, target, 1, noise)),
    ):
        counts = change.get("class_counts", COUNTS)
        settings = {name: value for name, value in change.items() if name != "class_counts"}
        epochs = (3,) if isinstance(loss, LPTLoss) else ()
        expected = type(loss)(counts, *epochs, noise_scale=0.05, **settings)
        before = loss(*inputs)
        for name, value in change.items():
            setattr(loss, name, value)
        assert loss(*inputs) == expected(*inputs) != before
        single = (
            [logits.float(), target, noise.float()]
            if isinstance(loss, AGCLLoss)
            else [Output(logits.float(), torch.zeros(8, 0)), target, 1, noise.float()]
        )
        assert loss(*single) == expected(*single), "float32 uses the delta buffer"


def test_assigned_settings_are_checked():
    loss = LPTLoss(COUNTS, 3)
    for name, value in {"margin": -1, "epochs": 0, "eta": math.nan, "normalize": 1, "instance_gamma_neg": "8"}.items():
        before = getattr(loss, name)
        with pytest.raises(ConfigError, match=f"{name}="):
            setattr(loss, name, value)
        assert getattr(loss, name) == before
    with pytest.raises(InputError, match=r"class_counts\[0\]=0 "):
        loss.class_counts = [0, 1]
    with pytest.raises(ConfigError, match="reduction='avg'"):
        AGCLLoss(COUNTS).reduction = "avg"


def test_half_and_double_keep_counts_and_delta_exact():
    logits, target, noise = batch(8, dtype=torch.float32)
    expected = AGCLLoss(COUNTS)(logits, target, noise)
    for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        assert convert(AGCLLoss(COUNTS))(logits, target, noise) == expected
