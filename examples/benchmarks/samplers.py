"""Time to create the samplers and to draw from them, at the size of iNaturalist 2018.

    python examples/benchmarks/samplers.py

Prints seconds and the peak memory that Python and NumPy allocate while drawing.
"""

import itertools
import time
import tracemalloc
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from lpt_peft.samplers import ClassBalancedSampler, DualSampler

Build = Callable[[], ClassBalancedSampler | DualSampler]


def long_tailed_labels(num_images: int, num_classes: int) -> list[int]:
    """Shuffled labels with exponentially decreasing class sizes (imbalance 500) and no empty class."""
    weights = 500.0 ** -np.linspace(0, 1, num_classes)
    generator = np.random.default_rng(0)
    rest = generator.choice(num_classes, num_images - num_classes, p=weights / weights.sum())
    return generator.permutation(np.concatenate([np.arange(num_classes), rest])).tolist()


def seconds_to_consume(items: Iterable[object]) -> float:
    start = time.perf_counter()
    for _ in items:
        pass
    return time.perf_counter() - start


def measure(name: str, build: Build) -> None:
    start = time.perf_counter()
    sampler = build()
    built = time.perf_counter() - start
    drawn = seconds_to_consume(sampler)
    tracemalloc.start()  # in a separate pass, because tracing is slow; later tenths need no more memory
    seconds_to_consume(itertools.islice(sampler, len(sampler) // 10))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{name:40}{built:>10.2f}{drawn:>10.2f}{peak / 1e6:>10.1f}")


def main(num_images: int = 500_000, num_classes: int = 8_142, num_draws: int = 1_000_000) -> None:
    labels = long_tailed_labels(num_images, num_classes)
    print(f"{num_images:,} labels (a list), {num_classes:,} classes, {num_draws:,} indices drawn")
    print(f"{'sampler':40}{'build s':>10}{'draw s':>10}{'peak MB':>10}")
    for run in (1, 4):
        single = partial(ClassBalancedSampler, labels, num_draws, samples_per_class=run)
        dual = partial(DualSampler, labels, 512, num_batches=-(-num_draws // 512), samples_per_class=run)
        measure(f"ClassBalancedSampler, runs of {run}", single)
        measure(f"DualSampler, batch_size=512, runs of {run}", dual)


if __name__ == "__main__":
    main()
