"""Gradients of frozen parameters are None in every phase, so that they do not affect gradient clipping."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lpt_peft import LongTailPromptAdapter
from tests.conftest import tiny_vit

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3])
PHASES = ("shared", "group")


def build(phase="shared"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = LongTailPromptAdapter.wrap(tiny_vit().double(), prompt_length=3, pool_size=5, head_dropout=0.0)
    adapter.phase = phase
    return adapter.train()


def backward(adapter, scale=1.0):
    (scale * F.cross_entropy(adapter(IMAGES), LABELS)).backward()


def clipped_norm(adapter):
    """Norm that clipping reports after a training step without zero_grad for frozen parameters."""
    optimizer = torch.optim.SGD(adapter.trainable_parameters(), lr=0.1)
    optimizer.zero_grad()
    backward(adapter)
    return nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)


def other(phase):
    return PHASES[1 - PHASES.index(phase)]


def by_assignment(adapter, phase, folder):
    adapter.phase = phase


def by_state_dict(adapter, phase, folder):
    adapter.load_state_dict(build(phase).state_dict())


def by_assigned_state_dict(adapter, phase, folder):
    adapter.load_state_dict(build(phase).state_dict(), assign=True)
    adapter.train()


def by_prompt_file(adapter, phase, folder):
    saved = build(phase)
    for module in (saved.shared, saved.pool, saved.head):
        module.float()  # prompt files have no float64
    saved.save_pretrained(folder)
    adapter.load_prompts(folder)


def by_buffer(adapter, phase, folder):
    adapter.phase_index.fill_(PHASES.index(phase))


def by_state_dict_of_a_parent(adapter, phase, folder):
    nn.ModuleDict({"model": adapter}).load_state_dict(nn.ModuleDict({"model": build(phase)}).state_dict())


CHANGES = [
    by_assignment,
    by_state_dict,
    by_assigned_state_dict,
    by_prompt_file,
    by_buffer,
    by_state_dict_of_a_parent,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("phase", PHASES)
def test_clipping_after_a_change_of_phase_equals_that_of_a_new_run(change, phase, tmp_path):
    adapter = build(other(phase))
    backward(adapter, scale=1e6)  # without zero_grad afterwards, as at the end of most loops
    change(adapter, phase, tmp_path)
    assert adapter.phase == phase
    frozen = [name for name, p in adapter.named_parameters() if not p.requires_grad and p.grad is not None]
    assert frozen == []
    tolerance = 1e-5 if change is by_prompt_file else 1e-12
    torch.testing.assert_close(clipped_norm(adapter).double(), clipped_norm(build(phase)), rtol=tolerance, atol=0)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda adapter: pickle.loads(pickle.dumps(adapter))])
def test_copies(duplicate, phase):
    adapter = build(other(phase))
    backward(adapter, scale=1e6)
    adapter = duplicate(adapter)
    adapter.phase = phase
    torch.testing.assert_close(clipped_norm(adapter), clipped_norm(build(phase)), rtol=1e-12, atol=0)


def test_an_optimizer_of_both_phases_steps_only_the_current_parameters():
    adapter = build()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    backward(adapter)
    optimizer.step()
    adapter.phase = "group"
    before = adapter.shared.prompts.detach().clone()
    backward(adapter)
    optimizer.step()
    assert torch.equal(adapter.shared.prompts, before)


@pytest.mark.parametrize("phase", PHASES)
def test_gradients_of_the_vit_from_before_wrap(phase):
    vit = tiny_vit().double()
    (1e6 * vit(IMAGES).square().sum()).backward()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = LongTailPromptAdapter.wrap(vit, prompt_length=3, pool_size=5, head_dropout=0.0).train()
    adapter.phase = phase
    assert all(parameter.grad is None for parameter in vit.parameters())
    torch.testing.assert_close(clipped_norm(adapter), clipped_norm(build(phase)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("phase", PHASES)
def test_modules_that_the_user_froze_lose_their_gradient_with_the_next_phase(phase):
    adapter = build(other(phase))
    backward(adapter, scale=1e6)
    adapter.head.requires_grad_(False)
    adapter.phase = phase
    assert adapter.head.weight.grad is None
    frozen = build(phase)
    frozen.head.requires_grad_(False)
    torch.testing.assert_close(clipped_norm(adapter), clipped_norm(frozen), rtol=1e-12, atol=0)
