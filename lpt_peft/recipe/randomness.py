"""Random numbers as a function of where a run is: of seed, phase and step, never of what was drawn before.

So a run that goes on after a break needs no random state from before it, and images are cropped the same by any number
of worker processes. The caller's random state is given back.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*key: int | str) -> int:
    """A seed of 32 bits; other keys give unrelated ones.

    Example:
        >>> seed_of(0, "shared", 7) == seed_of(0, "shared", 7), seed_of(0, "shared", 7) == seed_of(0, "shared", 8)
        (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Give the default generators of torch (on the CPU), numpy and Python back as they were."""
    state, legacy, plain = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - transforms use it
    try:
        yield
    finally:
        torch.set_rng_state(state)
        np.random.set_state(legacy)  # noqa: NPY002
        random.setstate(plain)


def start_at(seed: int) -> None:
    """Start these three generators at `seed`; only inside `kept_random_state`.

    Transforms draw from any of them. This is done for every image, so it is quick: `torch.manual_seed` would look for
    other devices, and numpy's own seeding takes longer than to fill its 624 words from a hash.
    """
    torch.default_generator.manual_seed(seed)
    words = np.frombuffer(hashlib.shake_128(repr(seed).encode()).digest(4 * 624), dtype=np.uint32)
    np.random.set_state(("MT19937", words, 624, 0, 0.0))  # noqa: NPY002
    random.setstate(random.Random(seed).getstate())
