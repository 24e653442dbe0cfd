"""Both samplers: order, length, epoch, position, state and data loaders."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import random
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from lpt_peft.errors import InputError
from lpt_peft.samplers import ClassBalancedSampler, DualSampler
from tests.samplers.draws import (
    LONG_TAIL,
    draws,
    half_sizes,
    label_lists,
    make_dual,
    make_single,
    makers,
    quick,
    worlds,
)


@makers
def test_order_depends_only_on_seed_and_epoch(make):
    sampler = make()
    first = list(sampler)
    assert list(sampler) == first == list(make()), "without set_epoch, the order repeats"
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first
    orders = [first, second, list(make(seed=4)), list(make(seed=3 + 2**32)), list(make(seed=1 + 2**64))]
    assert len({json.dumps(order) for order in orders}) == len(orders)
    assert sampler.epoch == 0


@makers
def test_types_of_labels(make):
    array = np.array(LONG_TAIL)
    forms = [tuple(LONG_TAIL), array, array.astype(np.uint8), torch.tensor(LONG_TAIL), torch.tensor(LONG_TAIL).int()]
    forms += [array.astype(object), [np.int64(label) for label in LONG_TAIL], [torch.tensor(x) for x in LONG_TAIL]]
    expected = list(make())
    assert all(list(make(labels=form)) == expected for form in forms)
    assert array.tolist() == LONG_TAIL
    sampler = make(labels=array)
    array[:] = 0
    assert list(sampler) == expected, "later changes to the array have no effect"


@makers
def test_indices_are_ints(make):
    items = list(make())
    flat = items if make is make_single else list(itertools.chain(*items))
    assert {type(row) for row in flat} == {int}
    assert set(flat) <= set(range(len(LONG_TAIL)))


@makers
def test_global_random_state_is_not_used(make):
    def states():
        return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()

    before = states()
    first = list(make())
    assert states() == before
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    assert list(make()) == first


@quick
@given(draws(), half_sizes, worlds, st.data())
def test_resume_from_any_position(build, half, world, data):
    ranks = {"num_replicas": world, "rank": data.draw(st.integers(0, world - 1))}
    for make in (lambda: build(DualSampler, 2 * half, **ranks), lambda: build(ClassBalancedSampler, **ranks)):
        sampler = make()
        complete = list(sampler)
        used = data.draw(st.integers(0, len(complete)))
        sampler.set_epoch(build.epoch + 1)
        sampler.set_epoch(build.epoch)
        assert list(itertools.islice(sampler, used)) == complete[:used]
        state = json.loads(json.dumps(sampler.state_dict()))
        assert state["position"] == used
        assert {type(value) for value in state.values()} == {int}

        resumed = make()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        resumed.set_epoch(build.epoch)  # as in an ordinary epoch loop; the position must be kept
        assert list(resumed) == complete[used:]
        assert resumed.state_dict()["position"] == len(complete)
        assert list(resumed) == complete, "the pass after the resumed pass is complete"
        resumed.load_state_dict(state)
        resumed.set_epoch(build.epoch + 1)
        sampler.set_epoch(build.epoch + 1)
        assert list(resumed) == list(sampler), "another epoch starts at position 0"


@makers
def test_positions_count_from_the_start_of_the_epoch(make):
    complete = list(make())
    sampler = make()
    sampler.load_state_dict(make().state_dict(position=2))
    assert list(itertools.islice(sampler, 3)) == complete[2:5]
    assert sampler.state_dict()["position"] == 5
    assert sampler.state_dict(position=4)["position"] == 4
    again = make()
    again.load_state_dict(sampler.state_dict(position=4))
    assert list(again) == complete[4:]
    sampler.set_epoch(1)
    assert sampler.state_dict()["position"] == 0


@pytest.mark.parametrize("position", [5, 17_003, 39_999, 40_000])
def test_resume_within_a_run_of_a_long_draw(position):
    sampler = make_single(num_samples=40_000)
    complete = list(sampler)
    sampler.load_state_dict(sampler.state_dict(position=position))
    assert list(sampler) == complete[position:]


@makers
def test_all_ranks_load_the_same_state(make):
    state = make(num_replicas=2, rank=0).state_dict(position=3)
    sampler = make(num_replicas=2, rank=1)
    complete = list(sampler)
    sampler.load_state_dict(state)
    assert list(sampler) == complete[3:]


@makers
def test_running_iterator_keeps_its_epoch(make):
    sampler = make()
    complete = list(sampler)
    iterator = iter(sampler)
    begun = [next(iterator)]
    sampler.set_epoch(1)
    assert begun + list(iterator) == complete


@makers
def test_unused_iterator_keeps_the_loaded_position(make):
    """A DataLoader with workers creates two iterators and uses the second."""
    sampler = make()
    sampler.load_state_dict(sampler.state_dict(position=3))
    iter(sampler)
    assert list(sampler) == list(make())[3:]


@makers
def test_pickle_and_deepcopy_keep_order_and_position(make):
    sampler = make()
    sampler.set_epoch(2)
    complete = list(sampler)
    iterator = iter(sampler)
    next(iterator)
    sampler.load_state_dict(sampler.state_dict())
    for twin in (pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)):
        assert twin.state_dict() == sampler.state_dict()
        assert list(twin) == complete[1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers):
    dataset = TensorDataset(torch.arange(len(LONG_TAIL)), torch.tensor(LONG_TAIL))
    sampler = make_dual()
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    assert len(loader) == len(sampler)
    complete = list(make_dual())
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = [images.tolist() for images, _ in loader]
        assert (batches == complete) == (epoch == 0)

    sampler.set_epoch(0)
    for step, (images, _) in enumerate(loader):
        assert images.tolist() == complete[step]
        if step == 3:
            state = sampler.state_dict(position=step + 1)
            assert (sampler.state_dict()["position"] > step + 1) == (workers > 0), "workers fetch in advance"
            break
    resumed = make_dual()
    resumed.load_state_dict(state)
    loader = DataLoader(dataset, batch_sampler=resumed, num_workers=workers)
    assert [images.tolist() for images, _ in loader] == complete[4:]

    single = DataLoader(dataset, batch_size=8, sampler=make_single())
    assert [row for images, _ in single for row in images.tolist()] == list(make_single())


@quick
@given(label_lists(), half_sizes, worlds)
def test_lengths(labels, half, world):
    for rank in range(world):
        ranks = {"num_replicas": world, "rank": rank}
        dual = DualSampler(labels, 2 * half, **ranks)
        assert len(list(dual)) == len(dual) == len(labels) // (half * world) + 1
        assert {len(batch) for batch in dual} == {2 * half}
        single = ClassBalancedSampler(labels, **ranks)
        assert len(list(single)) == len(single) == int(np.ceil(len(labels) / world))
        assert len(list(DualSampler(labels, 2 * half, num_batches=3, **ranks))) == 3
        assert len(list(ClassBalancedSampler(labels, 11, **ranks))) == int(np.ceil(11 / world))


def test_draws_are_lazy():
    """Memory does not depend on the size of the epoch: a huge epoch starts immediately."""
    sampler = make_single(num_samples=10**15)
    assert len(list(itertools.islice(sampler, 10))) == 10
    sampler.load_state_dict(sampler.state_dict(position=10**14))
    assert len(list(itertools.islice(sampler, 10))) == 10
    dual = make_dual(num_batches=10**12)
    dual.load_state_dict(dual.state_dict(position=10**11))
    assert len(next(iter(dual))) == 14


@makers
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": [*LONG_TAIL[:-1], 8]}, "labels_crc32"),
        ({"labels": LONG_TAIL[::-1]}, "labels_crc32"),
        ({"samples_per_class": 2}, "samples_per_class is 4 here and 2 in the state"),
        ({"seed": 8}, "seed is 3 here and 8 in the state"),
        ({"num_replicas": 2, "rank": 0}, "num_replicas is 1 here and 2 in the state"),
    ],
)
def test_state_of_another_draw(make, changes, words):
    sampler = make()
    before = sampler.state_dict()
    with pytest.raises(InputError, match=words):
        sampler.load_state_dict(make(**changes).state_dict(position=1))
    assert sampler.state_dict() == before


@makers
def test_invalid_state_changes_nothing(make):
    sampler = make()
    sampler.load_state_dict(make().state_dict(position=2))
    state = sampler.state_dict()
    other = make_single() if make is make_dual else make_dual()
    cases = [
        ({**state, "position": len(sampler) + 1}, r"state\['position'\]=.*from 0 to"),
        ({**state, "position": -1}, r"state\['position'\]=-1"),
        ({**state, "epoch": -1}, r"state\['epoch'\]=-1"),
        ({**state, "epoch": "1"}, r"state\['epoch'\]='1'"),
        ({**state, "extra": 1}, "has the keys.*extra"),
        ({name: value for name, value in state.items() if name != "seed"}, "has the keys.*state_dict"),
        (other.state_dict(), "has the keys"),
        ([1, 2], "has the keys.*not list"),
    ]
    for invalid, words in cases:
        with pytest.raises(InputError, match=words):
            sampler.load_state_dict(invalid)
        assert sampler.state_dict() == state
    assert list(sampler) == list(make())[2:]


def test_state_of_another_size():
    with pytest.raises(InputError, match="batch_size is 14 here and 16 in the state"):
        make_dual().load_state_dict(make_dual(batch_size=16).state_dict())
    with pytest.raises(InputError, match="num_batches is 15 here and 4 in the state"):
        make_dual().load_state_dict(make_dual(num_batches=4).state_dict())
    with pytest.raises(InputError, match="num_samples is 70 here and 71 in the state"):
        make_single().load_state_dict(make_single(num_samples=71).state_dict())


@makers
def test_repr(make):
    sampler = make(num_replicas=2, rank=1)
    sampler.set_epoch(4)
    sizes = "batch_size=14, num_batches=8" if make is make_dual else "num_samples=70"
    assert repr(sampler) == (
        f"{type(sampler).__name__}(images=101, classes=6, {sizes}, samples_per_class=4, seed=3, epoch=4, "
        "num_replicas=2, rank=1)"
    )


@makers
def test_labels_of_a_table(make):
    """The rows of a Series count, not its index."""
    pandas = pytest.importorskip("pandas")
    order = np.random.default_rng(0).permutation(len(LONG_TAIL))
    assert list(make(labels=pandas.Series(LONG_TAIL, index=order))) == list(make())
    assert list(make(labels=pandas.Series(LONG_TAIL, dtype=object))) == list(make())


@makers
def test_work_per_draw_does_not_depend_on_the_number_of_images(make):
    """After the first draw of an epoch, draws allocate less than one array of the labels."""
    labels = np.arange(400_000) % 50
    sizes = {"num_batches": 200} if make is make_dual else {"num_samples": 2_000}
    iterator = iter(make(labels=labels, **sizes))
    next(iterator)
    tracemalloc.start()
    drawn = list(itertools.islice(iterator, 150))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(drawn) == 150
    assert peak < labels.nbytes / 4
