"""ShotMetrics: batches, shards, merging and state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpt_peft.errors import InputError
from lpt_peft.metrics import SHOT_RULES, ShotMetrics
from tests.metrics.oracle import COUNTS, SIZE, assert_same, draw, filled


def test_reset():
    metrics = filled(*draw(30))
    metrics.reset()
    assert metrics.compute() == ShotMetrics(COUNTS).compute()


def test_logits_with_gradient_leave_no_graph():
    logits, target = draw(30)
    metrics = filled(logits.requires_grad_(), target)
    assert not any(value.requires_grad for value in vars(metrics).values() if isinstance(value, torch.Tensor))
    assert metrics.compute() == filled(logits.detach(), target).compute()


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_shards_in_any_order_equal_a_single_pass(data):
    logits, target = draw(40, seed=data.draw(st.integers(0, 5)))
    complete = filled(logits, target).compute()
    owner = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=40, max_size=40)))
    shuffle = torch.tensor(data.draw(st.permutations(range(40))))
    shards = [filled(logits[shuffle][owner == i], target[shuffle][owner == i]) for i in range(4)]
    merged = ShotMetrics(COUNTS)
    for shard in data.draw(st.permutations(shards)):
        assert merged.merge(shard) is merged
    assert merged.compute() == complete  # bitwise equal
    assert filled(logits[shuffle], target[shuffle]).compute() == complete


@given(st.permutations(range(SIZE)))
@settings(max_examples=20, deadline=None)
def test_permuting_classes_changes_no_mean(order):
    logits, target = draw(200)
    renamed = ShotMetrics([COUNTS[j] for j in order])
    renamed.update(logits[:, list(order)], torch.tensor([list(order).index(label) for label in target.tolist()]))
    permuted, expected = renamed.compute().to_dict(), filled(logits, target).compute().to_dict()
    assert permuted.pop("per_class") == [expected["per_class"][j] for j in order]
    assert expected["worst_class"] is not None
    assert expected["per_class"][order[permuted.pop("worst_class")]] == expected["worst_accuracy"]
    del expected["per_class"], expected["worst_class"]
    assert_same(permuted, expected, abs=1e-6)  # the float32 softmax adds its terms in a different order


def test_merge_keeps_the_rule_and_does_not_change_other():
    first, second = filled(*draw(30, seed=1)), ShotMetrics.from_rule("oltr", COUNTS)
    second.update(*draw(20, seed=2))
    before = second.compute()
    first.merge(second)
    second.update(*draw(5, seed=3))
    assert first.compute().num_images == 50
    assert first.rule == SHOT_RULES["lpt"]
    assert before.num_images == 20


def test_merge_with_other_class_counts():
    for other in (ShotMetrics([1, 2]), ShotMetrics([*COUNTS[:-1], 1]), None, {}):
        with pytest.raises(InputError, match=r"other must be a ShotMetrics with the same class_counts"):
            ShotMetrics(COUNTS).merge(other)


def test_copies_and_state(tmp_path):
    half, rest = draw(30, seed=1), draw(30, seed=2)
    metrics = filled(*half)
    torch.save(metrics.state_dict(), tmp_path / "state.pt")
    copies = [copy.deepcopy(metrics), pickle.loads(pickle.dumps(metrics)), ShotMetrics(COUNTS)]
    copies[2].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    metrics.update(*rest)
    for resumed in copies:
        assert resumed.compute() == filled(*half).compute()
        resumed.update(*rest)
        assert resumed.compute() == metrics.compute()


def test_state_dict_is_a_copy_both_ways():
    metrics = filled(*draw(30))
    expected, state = metrics.compute(), metrics.state_dict()
    for tensor in state.values():
        tensor.zero_()
    assert metrics.compute() == expected
    state = metrics.state_dict()
    metrics.load_state_dict(state)
    state["counters"].zero_()
    assert metrics.compute() == expected


def test_invalid_state_changes_nothing():
    metrics = filled(*draw(30))
    expected, state = metrics.compute(), metrics.state_dict()
    states = [
        {},
        {name: tensor for name, tensor in state.items() if name != "counters"},
        {**state, "more": torch.zeros(1)},
        {**state, "counters": state["counters"][:-1]},
        {**state, "counters": state["counters"].double()},
        ShotMetrics([1, 2, 3]).state_dict(),
    ]
    for invalid in states:
        with pytest.raises(InputError, match=r"state must contain .*pass a state_dict\(\) of as many classes"):
            metrics.load_state_dict(invalid)
    with pytest.raises(InputError, match="different class_counts"):
        metrics.load_state_dict({**state, "class_counts": state["class_counts"] + 1})
    assert metrics.compute() == expected


def test_class_counts_are_copied():
    counts = torch.tensor(COUNTS)
    metrics = ShotMetrics(counts)
    counts.zero_()
    assert metrics.class_counts.tolist() == COUNTS


def test_memory_is_linear_in_the_classes():
    size = 8142
    metrics = ShotMetrics(torch.randint(2, 1000, (size,), generator=torch.Generator().manual_seed(0)))
    for seed in range(3):
        metrics.update(*draw(64, size=size, seed=seed))
    tensors = [value for value in vars(metrics).values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert sum(tensor.numel() for tensor in tensors) < 4 * size
    assert len(pickle.dumps(metrics)) < 4 * 8 * size
    assert metrics.compute().num_images == 192


def test_default_device_does_not_move_the_counters():
    logits, target = draw(30)
    with torch.device("meta"):
        result = filled(logits, target).compute()
    assert result == filled(logits, target).compute()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_logits():
    logits, target = draw(100)
    metrics = filled(logits.cuda(), target.cuda())
    assert_same(metrics.compute().to_dict(), filled(logits, target).compute().to_dict(), abs=1e-6)


@pytest.mark.parametrize("state", [None, [1], {"counters": [1, 2]}, {"class_counts": None}])
def test_state_of_a_wrong_type(state):
    with pytest.raises(InputError, match="state must contain"):
        ShotMetrics([3, 2]).load_state_dict(state)
