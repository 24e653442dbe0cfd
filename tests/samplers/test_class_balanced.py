"""ClassBalancedSampler against brute force and statistical tests."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lpt_peft.samplers import ClassBalancedSampler
from tests.samplers.draws import check_class_balanced, draws, quick, worlds


@quick
@given(draws())
def test_matches_brute_force(build):
    rows = list(build(ClassBalancedSampler, 4 * build.run * len(set(build.labels))))
    check_class_balanced(rows, build.labels, build.run)
    assert set(Counter(build.labels[row] for row in rows).values()) == {4 * build.run}


@quick
@given(draws(), worlds, st.integers(1, 12))
def test_ranks_together_equal_a_single_process(build, world, rounds):
    def rows(num_replicas, rank):
        return list(build(ClassBalancedSampler, rounds * world * build.run, num_replicas=num_replicas, rank=rank))

    ranks = [np.reshape(rows(world, rank), (rounds, build.run)) for rank in range(world)]
    assert np.stack(ranks, 1).ravel().tolist() == rows(1, 0)


@pytest.mark.parametrize("run", [1, 2, 5, 8])
def test_images_are_uniform_and_independent_over_runs_and_ranks(run):
    """Chi-square at p > 0.001 with fixed seeds for the first and last images of the runs of a class with six images."""
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
