"""DualSampler against brute force and statistical tests."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from lpt_peft.samplers import DualSampler
from tests.samplers.draws import LONG_TAIL, check_class_balanced, draws, half_sizes, halves, make_dual, quick, worlds


@quick
@given(draws(), half_sizes)
def test_instance_half_draws_every_image_once_per_pass(build, half):
    size = len(build.labels)
    rows, _ = halves(list(build(DualSampler, 2 * half, num_batches=-(-3 * size // half))))
    for start in range(0, 3 * size, size):
        assert sorted(rows[start : start + size]) == list(range(size))


@quick
@given(draws(), half_sizes)
def test_class_half_matches_brute_force(build, half):
    batches = -(-4 * build.run * len(set(build.labels)) // half)
    _, rows = halves(list(build(DualSampler, 2 * half, num_batches=batches)))
    check_class_balanced(rows, build.labels, build.run)


def test_many_blocks_and_classes():
    """Draws longer than an internal block, of data sets larger and smaller than a block."""
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
            assert len(set(cycles)) == len(cycles) > 1, "each pass and each cycle is shuffled again"


def test_halves_are_drawn_independently():
    """With one image per class, both halves are permutations, which must differ."""
    instance, balanced = halves(list(DualSampler(range(30), 60, num_batches=5)))
    assert sorted(instance) == sorted(balanced)
    assert all(instance[start : start + 30] != balanced[start : start + 30] for start in range(0, 150, 30))


@quick
@given(draws(), half_sizes, worlds)
def test_ranks_together_equal_a_single_process(build, half, world):
    def batches(size, num_replicas, rank):
        return list(build(DualSampler, size, num_batches=5, num_replicas=num_replicas, rank=rank))

    ranks = [batches(2 * half, world, rank) for rank in range(world)]
    for step, batch in enumerate(batches(world * 2 * half, 1, 0)):
        assert batch == [row for half_index in (0, 1) for rank in ranks for row in halves([rank[step]])[half_index]]


@quick
@given(draws(), half_sizes, st.integers(2, 4))
def test_instance_halves_of_ranks_are_disjoint(build, half, world):
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


def test_default_epoch_draws_every_image_over_all_ranks():
    for world in (1, 2, 3):
        ranks = [make_dual(num_replicas=world, rank=rank) for rank in range(world)]
        assert {row for rank in ranks for row in halves(list(rank))[0]} == set(range(len(LONG_TAIL)))
