"""Random labels, samplers and brute-force checks for the tests of the samplers."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from lpt_peft.samplers import ClassBalancedSampler, DualSampler

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
    """Function that builds either sampler with the labels, run length, seed and epoch in its attributes."""

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
    """Check every rule of the docstring by brute force on cycles of runs."""
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


def make_dual(**changes):
    return DualSampler(**{"labels": LONG_TAIL, "batch_size": 14, "samples_per_class": 4, "seed": 3, **changes})


def make_single(**changes):
    return ClassBalancedSampler(
        **{"labels": LONG_TAIL, "num_samples": 70, "samples_per_class": 4, "seed": 3, **changes}
    )


makers = pytest.mark.parametrize("make", [make_dual, make_single])
