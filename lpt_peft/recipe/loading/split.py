"""split_validation: part of the training images of each class for choosing, the rest for training."""

from __future__ import annotations

import numpy as np

from lpt_peft._numbers import checked_integer
from lpt_peft.errors import ConfigError
from lpt_peft.samplers.checks import Labels, checked_labels


def split_validation(labels: Labels, share: float, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices for training and for validation, each in ascending order.

    Of a class of `n` images, `int(share * n)` are for validation: rare classes keep all of theirs for training, and
    have no say in what is chosen.

    Args:
        labels: Class of every image, (N,) whole numbers of at least 0.
        share: Above 0 and below 1.
        seed: Which images.

    Raises:
        InputError: The labels are none.
        ConfigError: The share is out of range, or no class is large enough to give an image.

    Example:
        >>> train, validation = split_validation([0] * 10 + [1] * 3, share=0.2)
        >>> len(train), len(validation)
        (11, 2)
    """
    classes = checked_labels(labels)
    if not 0 < share < 1:
        raise ConfigError(f"share={share} must be above 0 and below 1.")
    generator = np.random.default_rng(checked_integer("seed", seed, 0))
    held = np.zeros(len(classes), dtype=bool)
    for label, count in enumerate(np.bincount(classes)):
        rows = generator.permutation(np.flatnonzero(classes == label))
        held[rows[: int(share * count)]] = True
    if not held.any():
        raise ConfigError(
            f"share={share} of the largest class is less than one image; give more, or a part of its own."
        )
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()
