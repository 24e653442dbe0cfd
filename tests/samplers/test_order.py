"""The order of draws stays the same between versions: checksums of an earlier version, with 64-bit indices."""

from __future__ import annotations

import tracemalloc
import zlib
from itertools import chain

import numpy as np
import pytest

from lpt_peft.samplers import ClassBalancedSampler, DualSampler
from tests.samplers.draws import LONG_TAIL

# labels, run, ranks: ClassBalancedSampler, DualSampler, labels_crc32
CHECKSUMS = {
    ("few", 1, 1): (2915242113, 2373878493, 3787055446),
    ("few", 4, 3): (476562355, 1391317990, 3787055446),
    ("large", 4, 1): (2095399158, 3150933271, 2496641933),
    ("large", 1, 3): (2189359309, 1556066458, 2496641933),
    ("many", 1, 1): (1525249504, 2913019319, 2046962504),
    ("many", 4, 3): (580706936, 2551730510, 2046962504),
    ("sparse", 4, 1): (2558554863, 2053176172, 1157752853),
    ("sparse", 1, 3): (1366070161, 2663519531, 1157752853),
}


def labels_of(kind):
    """Labels of a few classes, of 300 squares, of 70,000 classes (more than 16 bits), and of large numbers."""
    generator = np.random.default_rng(5)
    if kind == "few":
        return LONG_TAIL
    if kind == "large":
        return generator.integers(0, 300, 70_000) ** 2
    if kind == "many":
        return generator.permutation(np.arange(140_000) % 70_000)
    return np.array([2**62, 3, 2**40, 3, 2**62, 11, 3] * 50)


def checksum(rows):
    return zlib.crc32(np.asarray(rows, dtype="<i8").tobytes())


@pytest.mark.parametrize(("kind", "run", "ranks"), CHECKSUMS, ids=str)
def test_order_is_that_of_the_checksums(kind, run, ranks):
    options = {"samples_per_class": run, "seed": 7, "num_replicas": ranks, "rank": 1 if ranks > 1 else 0}
    single = ClassBalancedSampler(labels_of(kind), num_samples=90_000, **options)
    dual = DualSampler(labels_of(kind), 64, num_batches=3000, **options)
    for sampler in (single, dual):
        sampler.set_epoch(2)
    found = checksum(list(single)), checksum(list(chain.from_iterable(dual))), dual.state_dict()["labels_crc32"]
    assert found == CHECKSUMS[kind, run, ranks]


@pytest.mark.parametrize("make", [ClassBalancedSampler, lambda labels: DualSampler(labels, 64)], ids=["single", "dual"])
def test_bytes_per_image(make):
    """2 for the class, 4 for the members of the classes and 4 for the permutation; 10 and 18 at the peaks."""
    labels = np.random.default_rng(0).integers(0, 300, 400_000)
    tracemalloc.start()
    sampler = make(labels)
    _, building = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    iterator = iter(sampler)
    next(iterator)
    kept, drawing = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert building < 11 * len(labels)
    assert drawing < 21 * len(labels)
    assert kept < 11.5 * len(labels)
