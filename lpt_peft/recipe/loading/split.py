"""Hold back a fraction of each class's training images for validation."""

from __future__ import annotations

import numpy as np

from lpt_peft._numbers import checked_integer
from lpt_peft.errors import ConfigError
from lpt_peft.samplers.checks import Labels, checked_labels


def split_validation(labels: Labels, share: float, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices for training and for validation, each in ascending order.

    Of a class of `n` images, `int(share * n)` are held back: rare classes keep all of their images for training and do
    not influence choices made by validation.

    Args:
        labels: Class of every image, (N,) integers of at least 0.
        share: Above 0 and below 1.
        seed: Determines which images are held back.

    Raises:
        InputError: The labels are invalid.
        ConfigError: The share is out of range, or too small for the largest class to contribute an image.

    Example:
        >>> train, validation = split_validation([0] * 10 + [1] * 3, share=0.2)
        >>> len(train), len(validation)
        (11, 2)
    """
    classes = checked_labels(labels)
    if not 0 < share < 1:
        raise ConfigError(f"share={share} must be above 0 and below 1.")
    generator = np.random.default_rng(checked_integer("seed", seed, 0))
    held_back = np.zeros(len(classes), dtype=bool)
    for label, count in enumerate(np.bincount(classes)):
        rows = generator.permutation(np.flatnonzero(classes == label))
        held_back[rows[: int(share * count)]] = True
    if not held_back.any():
        raise ConfigError(
            f"share={share} of the largest class is less than one image; give a larger share, or a validation split."
        )
    return np.flatnonzero(~held_back).tolist(), np.flatnonzero(held_back).tolist()
