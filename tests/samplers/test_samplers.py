"""Samplers against their description: properties over random labels, brute force, and two real processes.

Draws are judged by what a slow reading of the rules demands of them, never by recorded output.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import random
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from timm.data import Mixup
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from lpt_peft.errors import ConfigError, InputError, LPTError
from lpt_peft.losses import AGCLLoss, LPTLoss
from lpt_peft.samplers import ClassBalancedSampler, DualSampler

ROOT = Path(__file__).parents[1]
LONG_TAIL = [0] * 60 + [1] * 25 + [2] * 9 + [5] * 4 + [7] * 2 + [9]  # classes 3, 4, 6 and 8 have no image
quick = settings(max_examples=40, deadline=None)


@st.composite
def label_lists(draw):
    """Labels of 2 to 7 classes with 1 to 12 images each, in any order, possibly with gaps between the numbers."""
    classes = draw(st.lists(st.integers(0, 40), min_size=2, max_size=7, unique=True))
    counts = draw(st.lists(st.integers(1, 12), min_size=len(classes), max_size=len(classes)))
    return draw(st.permutations([label for label, count in zip(classes, counts, strict=True) for _ in range(count)]))


@st.composite
def draws(draw):
    """A function that builds either sampler on the same labels, run length, seed and epoch; these as attributes."""

    def build(sampler_class, *args, **ranks):
        sampler = sampler_class(build.labels, *args, samples_per_class=build.run, seed=build.seed, **ranks)
        sampler.set_epoch(build.epoch)
        return sampler

    build.labels, build.run = draw(label_lists()), draw(st.integers(1, 5))
    build.seed, build.epoch = draw(st.integers(0, 2**70)), draw(st.integers(0, 1000))
    return build


half_sizes, worlds = st.integers(1, 9), st.integers(1, 4)


def halves(batches):
    """The instance-balanced and the class-balanced rows of a list of batches, each in order."""
    middle = len(batches[0]) // 2
    return [i for batch in batches for i in batch[:middle]], [i for batch in batches for i in batch[middle:]]


def check_class_balanced(rows, labels, run):
    """Brute force: read the rows as cycles of runs and hold each rule of the docstring against them."""
    members = Counter(labels)
    cycle = run * len(members)
    for start in range(0, len(rows) - cycle + 1, cycle):
        seen = []
        for first in range(start, start + cycle, run):
            images = rows[first : first + run]
            (label,) = {labels[image] for image in images}
            seen.append(label)
            times = Counter(images)
            assert len(times) == min(run, members[label])
            assert max(times.values()) - min(times.values()) <= 1
            assert max(times.values()) == -(-run // members[label])
        assert sorted(seen) == sorted(members), "each class once per cycle"


@quick
@given(draws(), half_sizes)
def test_instance_half_takes_every_image_once_per_pass(build, half):
    size = len(build.labels)
    rows, _ = halves(list(build(DualSampler, 2 * half, num_batches=-(-3 * size // half))))
    for start in range(0, 3 * size, size):
        assert sorted(rows[start : start + size]) == list(range(size))


@quick
@given(draws(), half_sizes)
def test_class_half_holds_the_rules_of_a_slow_reading(build, half):
    batches = -(-4 * build.run * len(set(build.labels)) // half)
    _, rows = halves(list(build(DualSampler, 2 * half, num_batches=batches)))
    check_class_balanced(rows, build.labels, build.run)


@quick
@given(draws())
def test_class_balanced_sampler_holds_the_rules_of_a_slow_reading(build):
    rows = list(build(ClassBalancedSampler, 4 * build.run * len(set(build.labels))))
    check_class_balanced(rows, build.labels, build.run)
    assert set(Counter(build.labels[row] for row in rows).values()) == {4 * build.run}


def test_rules_hold_across_many_blocks_and_classes():
    """Draws longer than one internal block, of data larger and smaller than one."""
    for images, classes in ((40_000, 5_000), (300, 7)):
        labels = np.concatenate([np.arange(classes), np.random.default_rng(0).integers(0, classes, images - classes)])
        half = 999
        sampler = DualSampler(labels, 2 * half, samples_per_class=4, num_batches=90)
        instance, balanced = halves(list(sampler))
        for start in range(0, len(instance) - images + 1, images):
            assert np.array_equal(np.sort(instance[start : start + images]), np.arange(images))
        check_class_balanced(balanced, labels.tolist(), 4)
        for rows, cycle in ((instance, images), (balanced, 4 * classes)):
            cycles = [tuple(rows[start : start + cycle]) for start in range(0, len(rows), cycle)]
            assert len(set(cycles)) == len(cycles) > 1, "each pass and each cycle is shuffled anew"


def test_halves_are_drawn_apart_from_each_other():
    """With one image per class both halves are permutations; they must not be the same one."""
    instance, balanced = halves(list(DualSampler(range(30), 60, num_batches=5)))
    assert sorted(instance) == sorted(balanced)
    assert all(instance[start : start + 30] != balanced[start : start + 30] for start in range(0, 150, 30))


@quick
@given(draws(), half_sizes, worlds)
def test_ranks_together_draw_what_one_process_draws(build, half, world):
    def batches(size, num_replicas, rank):
        return list(build(DualSampler, size, num_batches=5, num_replicas=num_replicas, rank=rank))

    parts = [batches(2 * half, world, rank) for rank in range(world)]
    for step, batch in enumerate(batches(world * 2 * half, 1, 0)):
        assert batch == [row for which in (0, 1) for part in parts for row in halves([part[step]])[which]]


@quick
@given(draws(), half_sizes, st.integers(2, 4))
def test_instance_halves_of_ranks_are_disjoint_within_a_pass(build, half, world):
    size = len(build.labels)
    assume(size >= world)
    half = min(half, size // world)
    steps = size // (half * world)
    ranks = [
        halves(list(build(DualSampler, 2 * half, num_batches=steps, num_replicas=world, rank=rank)))[0]
        for rank in range(world)
    ]
    together = list(itertools.chain(*ranks))
    assert len(together) == len(set(together)) == steps * half * world


@quick
@given(draws(), worlds, st.integers(1, 12))
def test_class_balanced_ranks_are_dealt_the_runs_of_one_process(build, world, deals):
    def rows(num_replicas, rank):
        return list(build(ClassBalancedSampler, deals * world * build.run, num_replicas=num_replicas, rank=rank))

    parts = [np.reshape(rows(world, rank), (deals, build.run)) for rank in range(world)]
    assert np.stack(parts, 1).ravel().tolist() == rows(1, 0)


@pytest.mark.parametrize("run", [1, 2, 5, 8])
def test_images_of_a_class_are_uniform_and_independent_over_runs_and_ranks(run):
    """Chi-square at p > 0.001 under fixed seeds, on the first and last image of the runs of one class of six."""
    labels = [0] * 6 + [1] * 5
    images, next_run, other_rank = np.zeros((2, 6)), np.zeros((6, 6)), np.zeros((6, 6))
    for seed in range(20):
        firsts = []
        for rank in (0, 1):
            sampler = ClassBalancedSampler(
                labels, 800 * run, samples_per_class=run, seed=seed, num_replicas=2, rank=rank
            )
            of_class = np.array([rows for rows in np.reshape(list(sampler), (-1, run)) if labels[rows[0]] == 0])
            np.add.at(images[0], of_class[:, 0], 1)
            np.add.at(images[1], of_class[:, -1], 1)
            firsts.append(of_class[:, 0])
        pairs = min(map(len, firsts)) // 2 * 2
        np.add.at(next_run, (firsts[0][0:pairs:2], firsts[0][1:pairs:2]), 1)
        np.add.at(other_rank, (firsts[0][:pairs], firsts[1][:pairs]), 1)
    assert images.sum(1).min() > 7000
    assert stats.chisquare(images, axis=1).pvalue.min() > 1e-3
    assert stats.chi2_contingency(next_run).pvalue > 1e-3
    assert stats.chi2_contingency(other_rank).pvalue > 1e-3


def test_runs_are_simple_random_samples_of_their_class():
    """Over epochs, every ordered pair of two images is equally frequent in a run of two."""
    labels = [0] * 4 + [1]
    pairs = Counter()
    sampler = ClassBalancedSampler(labels, 4, samples_per_class=2)
    for epoch in range(900):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        pairs[tuple(rows[:2] if labels[rows[0]] == 0 else rows[2:])] += 1
    assert len(pairs) == 12
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-3


def test_class_order_and_instance_order_are_uniform():
    labels = [0, 1, 2, 2]
    classes, images = Counter(), Counter()
    for seed in range(900):
        (batch,) = DualSampler(labels, 8, num_batches=1, seed=seed)
        images[tuple(batch[:4])] += 1
        classes[tuple(labels[row] for row in batch[4:7])] += 1
    assert (len(classes), len(images)) == (6, 24)
    assert stats.chisquare(list(classes.values())).pvalue > 1e-3
    assert stats.chisquare(list(images.values())).pvalue > 1e-3


def make_dual(**changes):
    return DualSampler(**{"labels": LONG_TAIL, "batch_size": 14, "samples_per_class": 4, "seed": 3, **changes})


def make_single(**changes):
    return ClassBalancedSampler(
        **{"labels": LONG_TAIL, "num_samples": 70, "samples_per_class": 4, "seed": 3, **changes}
    )


makers = pytest.mark.parametrize("make", [make_dual, make_single])


@makers
def test_order_is_a_pure_function_of_seed_and_epoch(make):
    sampler = make()
    first = list(sampler)
    assert list(sampler) == first == list(make()), "without set_epoch the same order again"
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first
    orders = [first, second, list(make(seed=4)), list(make(seed=3 + 2**32)), list(make(seed=1 + 2**64))]
    assert len({json.dumps(order) for order in orders}) == len(orders)
    assert sampler.epoch == 0


@makers
def test_labels_may_be_list_tuple_array_or_tensor_and_are_not_changed(make):
    array = np.array(LONG_TAIL)
    forms = [tuple(LONG_TAIL), array, array.astype(np.uint8), torch.tensor(LONG_TAIL), torch.tensor(LONG_TAIL).int()]
    expected = list(make())
    assert all(list(make(labels=form)) == expected for form in forms)
    assert array.tolist() == LONG_TAIL
    sampler = make(labels=array)
    array[:] = 0
    assert list(sampler) == expected, "the caller's array may change afterwards"


@makers
def test_indices_are_plain_ints(make):
    items = list(make())
    flat = items if make is make_single else list(itertools.chain(*items))
    assert {type(row) for row in flat} == {int}
    assert set(flat) <= set(range(len(LONG_TAIL)))


@makers
def test_global_random_state_is_neither_read_nor_changed(make):
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
def test_resume_from_any_place_gives_the_identical_remainder(build, half, world, data):
    ranks = {"num_replicas": world, "rank": data.draw(st.integers(0, world - 1))}
    for make in (lambda: build(DualSampler, 2 * half, **ranks), lambda: build(ClassBalancedSampler, **ranks)):
        sampler = make()
        whole = list(sampler)
        used = data.draw(st.integers(0, len(whole)))
        sampler.set_epoch(build.epoch + 1)
        sampler.set_epoch(build.epoch)
        assert list(itertools.islice(sampler, used)) == whole[:used]
        state = json.loads(json.dumps(sampler.state_dict()))
        assert state["position"] == used
        assert {type(value) for value in state.values()} == {int}

        resumed = make()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        resumed.set_epoch(build.epoch)  # what an ordinary epoch loop does; the place must survive it
        assert list(resumed) == whole[used:]
        assert resumed.state_dict()["position"] == len(whole)
        assert list(resumed) == whole, "the pass after the resumed one is whole again"
        resumed.load_state_dict(state)
        resumed.set_epoch(build.epoch + 1)
        sampler.set_epoch(build.epoch + 1)
        assert list(resumed) == list(sampler), "another epoch begins at its beginning"


@makers
def test_resume_counts_from_the_beginning_of_the_epoch(make):
    whole = list(make())
    sampler = make()
    sampler.load_state_dict(make().state_dict(position=2))
    assert list(itertools.islice(sampler, 3)) == whole[2:5]
    assert sampler.state_dict()["position"] == 5
    assert sampler.state_dict(position=4)["position"] == 4
    again = make()
    again.load_state_dict(sampler.state_dict(position=4))
    assert list(again) == whole[4:]
    sampler.set_epoch(1)
    assert sampler.state_dict()["position"] == 0


@pytest.mark.parametrize("position", [5, 17_003, 39_999, 40_000])
def test_resume_in_a_long_draw_within_a_run(position):
    sampler = make_single(num_samples=40_000)
    whole = list(sampler)
    sampler.load_state_dict(sampler.state_dict(position=position))
    assert list(sampler) == whole[position:]


@makers
def test_one_state_serves_all_ranks(make):
    state = make(num_replicas=2, rank=0).state_dict(position=3)
    sampler = make(num_replicas=2, rank=1)
    whole = list(sampler)
    sampler.load_state_dict(state)
    assert list(sampler) == whole[3:]


@makers
def test_a_running_iterator_keeps_its_epoch(make):
    sampler = make()
    whole = list(sampler)
    iterator = iter(sampler)
    begun = [next(iterator)]
    sampler.set_epoch(1)
    assert begun + list(iterator) == whole


@makers
def test_an_iterator_that_is_dropped_unused_does_not_spend_the_loaded_place(make):
    """A DataLoader with workers makes two iterators and uses the second."""
    sampler = make()
    sampler.load_state_dict(sampler.state_dict(position=3))
    iter(sampler)
    assert list(sampler) == list(make())[3:]


@makers
def test_pickle_and_deepcopy_keep_order_and_place(make):
    sampler = make()
    sampler.set_epoch(2)
    whole = list(sampler)
    iterator = iter(sampler)
    next(iterator)
    sampler.load_state_dict(sampler.state_dict())
    for twin in (pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)):
        assert twin.state_dict() == sampler.state_dict()
        assert list(twin) == whole[1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers):
    dataset = TensorDataset(torch.arange(len(LONG_TAIL)), torch.tensor(LONG_TAIL))
    sampler = make_dual()
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    assert len(loader) == len(sampler)
    whole = list(make_dual())
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = [images.tolist() for images, _ in loader]
        assert (batches == whole) == (epoch == 0)

    sampler.set_epoch(0)
    for step, (images, _) in enumerate(loader):
        assert images.tolist() == whole[step]
        if step == 3:
            state = sampler.state_dict(position=step + 1)
            assert (sampler.state_dict()["position"] > step + 1) == (workers > 0), "workers fetch ahead"
            break
    resumed = make_dual()
    resumed.load_state_dict(state)
    loader = DataLoader(dataset, batch_sampler=resumed, num_workers=workers)
    assert [images.tolist() for images, _ in loader] == whole[4:]

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


def test_default_epoch_sees_every_image_over_all_ranks():
    for world in (1, 2, 3):
        ranks = [make_dual(num_replicas=world, rank=rank) for rank in range(world)]
        assert {row for rank in ranks for row in halves(list(rank))[0]} == set(range(len(LONG_TAIL)))


def test_a_million_draws_are_lazy():
    """Nothing of the size of the epoch is made: an epoch far beyond memory starts at once."""
    sampler = make_single(num_samples=10**15)
    assert len(list(itertools.islice(sampler, 10))) == 10
    sampler.load_state_dict(sampler.state_dict(position=10**14))
    assert len(list(itertools.islice(sampler, 10))) == 10
    dual = make_dual(num_batches=10**12)
    dual.load_state_dict(dual.state_dict(position=10**11))
    assert len(next(iter(dual))) == 14


WORKER = """
import json, sys, torch.distributed as dist
from lpt_peft.losses import AGCLLoss, LPTLoss
from lpt_peft.samplers import ClassBalancedSampler, DualSampler
rank, store, labels = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
early, single = DualSampler(labels, 8, samples_per_class=2), ClassBalancedSampler(labels, 40, samples_per_class=2)
before = [len(early), len(single), early.state_dict()["num_replicas"], repr(early)]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
late = DualSampler(labels, 8, samples_per_class=2)
for dual in (early, late):
    dual.set_epoch(5)
assert list(early) == list(late)
after = [len(early), len(single), early.state_dict()["num_replicas"], repr(early)]
fixed = DualSampler(labels, 8, num_replicas=4, rank=3)
assert fixed.state_dict()["num_replicas"] == 4
print(json.dumps([list(early), list(single), before, after]))
dist.destroy_process_group()
"""


def test_two_processes_share_one_draw_by_samplers_made_before_the_process_group(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store"), json.dumps(LONG_TAIL)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    (dual0, single0, before0, after0), (dual1, single1, before1, after1) = map(json.loads, outputs)
    assert before0 == before1
    assert before0[:3] == [len(LONG_TAIL) // 4 + 1, 40, 1]
    assert after0[:3] == after1[:3] == [len(LONG_TAIL) // 8 + 1, 20, 2]
    assert before0[3].endswith("num_replicas=1, rank=0)")
    assert after1[3].endswith("num_replicas=2, rank=1)")
    instance0, instance1 = (halves(batches)[0][: len(LONG_TAIL) // 8 * 4] for batches in (dual0, dual1))
    assert len(set(instance0) | set(instance1)) == len(instance0) + len(instance1) == len(LONG_TAIL) // 8 * 8

    whole = DualSampler(LONG_TAIL, 16, samples_per_class=2)
    whole.set_epoch(5)
    assert [a[:4] + b[:4] + a[4:] + b[4:] for a, b in zip(dual0, dual1, strict=True)] == list(whole)
    dealt = np.stack([np.reshape(single0, (-1, 2)), np.reshape(single1, (-1, 2))], 1).ravel().tolist()
    assert dealt == list(ClassBalancedSampler(LONG_TAIL, 40, samples_per_class=2))


@makers
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"labels": []}, InputError, "labels are empty"),
        ({"labels": torch.zeros(0, dtype=torch.long)}, InputError, "labels are empty"),
        ({"labels": [4, 4, 4]}, InputError, r"one class only \(4\).*RandomSampler"),
        ({"labels": [0, 1, -1]}, InputError, r"at least 0, but labels\[2\] is -1"),
        ({"labels": [0.0, 1.0]}, InputError, "whole numbers, not float64"),
        ({"labels": torch.tensor([0.5, 1.0])}, InputError, "whole numbers, not float32"),
        ({"labels": [True, False]}, InputError, "whole numbers, not bool"),
        ({"labels": ["cat", "dog"]}, InputError, "whole numbers, not <U3.*encode"),
        ({"labels": [[0, 1], [1, 0]]}, InputError, r"one-dimensional, not of shape \(2, 2\).*argmax"),
        ({"labels": [[0, 1], [1]]}, InputError, "labels cannot be read"),
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
def test_bad_arguments_are_refused_by_name(make, changes, error, words):
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
def test_bad_sizes_are_refused_by_name(make, changes, words):
    with pytest.raises(ConfigError, match=words):
        make(**changes)


@makers
def test_bad_epoch_and_position_are_refused_by_name(make):
    sampler = make()
    for epoch in (-1, 0.5, None):
        with pytest.raises(ConfigError, match=r"epoch=.*at least 0"):
            sampler.set_epoch(epoch)
    for position in (-1, len(sampler) + 1, 0.5):
        with pytest.raises(ConfigError, match=rf"position=.*from 0 to {len(sampler)}"):
            sampler.state_dict(position=position)


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
def test_a_state_of_another_draw_is_refused_with_the_difference(make, changes, words):
    sampler = make()
    before = sampler.state_dict()
    with pytest.raises(InputError, match=words):
        sampler.load_state_dict(make(**changes).state_dict(position=1))
    assert sampler.state_dict() == before


@makers
def test_a_broken_state_is_refused_and_changes_nothing(make):
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
    for broken, words in cases:
        with pytest.raises(InputError, match=words):
            sampler.load_state_dict(broken)
        assert sampler.state_dict() == state
    assert list(sampler) == list(make())[2:]


def test_a_state_of_another_size_is_refused():
    with pytest.raises(InputError, match="batch_size is 14 here and 16 in the state"):
        make_dual().load_state_dict(make_dual(batch_size=16).state_dict())
    with pytest.raises(InputError, match="num_batches is 15 here and 4 in the state"):
        make_dual().load_state_dict(make_dual(num_batches=4).state_dict())
    with pytest.raises(InputError, match="num_samples is 70 here and 71 in the state"):
        make_single().load_state_dict(make_single(num_samples=71).state_dict())


@makers
def test_repr_shows_sizes_and_epoch(make):
    sampler = make(num_replicas=2, rank=1)
    sampler.set_epoch(4)
    sizes = "batch_size=14, num_batches=8" if make is make_dual else "num_samples=70"
    assert repr(sampler) == (
        f"{type(sampler).__name__}(images=101, classes=6, {sizes}, samples_per_class=4, seed=3, epoch=4, "
        "num_replicas=2, rank=1)"
    )


# --- Mixup and CutMix -----------------------------------------------------------------------------------------------


def dual_batch():
    """Images and labels of a batch of 8; the image of row i is 1 in channel i and 0 elsewhere."""
    rows = next(iter(DualSampler(LONG_TAIL, 8)))
    images = torch.eye(8)[:, :, None, None].expand(8, 8, 16, 16).clone()
    return images, torch.tensor([LONG_TAIL[row] for row in rows])


def partners(mixed):
    """For each row the one other row that is mixed into it."""
    found = []
    for row, channels in enumerate(mixed.amax((2, 3))):
        (other,) = {channel for channel in range(8) if channels[channel] > 0} - {row}
        found.append(other)
    return found


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", [{"mixup_alpha": 1.0}, {"mixup_alpha": 0.0, "cutmix_minmax": (0.4, 0.6)}])
def test_timm_mixes_every_instance_balanced_row_with_a_class_balanced_one(kind, mode):
    images, target = dual_batch()
    mixed, soft = Mixup(mode=mode, num_classes=10, **kind)(images, target)
    assert partners(mixed) == [7, 6, 5, 4, 3, 2, 1, 0]
    with pytest.raises(InputError, match="Mixup and CutMix.*class indices only"):
        LPTLoss([1] * 10, epochs=1)(SimpleNamespace(logits=torch.zeros(8, 10), similarity=torch.zeros(8, 0)), soft)


@pytest.mark.parametrize("kind", [v2.MixUp, v2.CutMix])
def test_torchvision_mixes_within_the_halves_except_for_their_first_rows(kind):
    images, target = dual_batch()
    with torch.random.fork_rng():
        torch.manual_seed(2)  # a CutMix box that is not empty
        mix = kind(num_classes=10)
        mixed, soft = mix(images, target)
        assert partners(mixed) == [7, 0, 1, 2, 3, 4, 5, 6]
        halves_alone = [mix(images[rows], target[rows])[0] for rows in (slice(4), slice(4, 8))]
    assert partners(torch.cat(halves_alone)) == [3, 0, 1, 2, 7, 4, 5, 6]
    with pytest.raises(InputError, match="Mixup and CutMix.*class indices only"):
        AGCLLoss([1] * 10)(torch.zeros(8, 10), soft)


def test_benchmark_runs(capsys):
    module = runpy.run_path(str(ROOT / "examples/benchmarks/samplers.py"))
    labels = module["long_tailed_labels"](500, 20)
    assert (len(labels), set(labels)) == (500, set(range(20)))
    module["main"](num_images=500, num_classes=20, num_draws=2000)
    assert capsys.readouterr().out.count("DualSampler") == 2
