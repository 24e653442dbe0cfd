"""Seeding torch's default generators for the duration of a block; no other module seeds them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's default generators inside the context and restore their state afterwards."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the default generators of torch (CPU), NumPy and Python on exit."""
    state, legacy, plain = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - transforms use it
    try:
        yield
    finally:
        torch.set_rng_state(state)
        np.random.set_state(legacy)  # noqa: NPY002
        random.setstate(plain)


def seed_all(seed: int) -> None:
    """Seed the default generators of torch (CPU), NumPy and Python; only inside `preserve_random_state`.

    Image transforms may draw from any of the three. This runs once per image, so it avoids `torch.manual_seed`, which
    looks for other devices, and NumPy's own seeding, which takes longer than filling its 624 words from a hash.

    Args:
        seed: At least 0.
    """
    torch.default_generator.manual_seed(seed)
    words = np.frombuffer(hashlib.shake_128(repr(seed).encode()).digest(4 * 624), dtype=np.uint32)
    np.random.set_state(("MT19937", words, 624, 0, 0.0))  # noqa: NPY002
    random.setstate(random.Random(seed).getstate())


def derive_seed(*key: int | str) -> int:
    """A 32-bit seed from a key; different keys give unrelated seeds.

    A run derives every seed from its own seed, the phase and the step, never from numbers drawn before. A resumed run
    therefore needs no saved generator state, and worker processes do not change how images are cropped.

    Example:
        >>> derive_seed(0, "shared", 7) == derive_seed(0, "shared", 7)
        True
        >>> derive_seed(0, "shared", 7) == derive_seed(0, "shared", 8)
        False
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")
