"""Long-tailed handwritten digits: the 1,797 scans of scikit-learn, as dark ink on light paper.

A data set without a download, for demonstrations and tests. Requires scikit-learn: `lpt_peft[demo]`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from lpt_peft.data.long_tail import exponential_counts
from lpt_peft.errors import ConfigError, MissingExtraError

Split = Literal["train", "validation", "test"]
NUM_CLASSES, TEST_PER_CLASS, VALIDATION_PER_CLASS = 10, 50, 30
HEAD_COUNT, TAIL_COUNT = 120, 2
PIXELS, PAPER, INK = 32, 0.9, 0.1
_SPLIT_SEED = 0


def digits_counts() -> list[int]:
    """Training images per digit: 120 for "0", falling exponentially to 2 for "9".

    Example:
        >>> digits_counts()
        [120, 76, 48, 30, 19, 12, 7, 4, 3, 2]
    """
    return exponential_counts(NUM_CLASSES, HEAD_COUNT, HEAD_COUNT / TAIL_COUNT)


class DigitsLT(Dataset[tuple[Tensor, int]]):
    """A split of the long-tailed digits; yields (image (3, 32, 32) float32, label).

    The splits are fixed. A seeded generator shuffles the scans of each digit; the first 50 are test images, the next
    120 ... 2 are training images, and up to 30 of the remaining scans are validation images.

    Args:
        split: "train", "validation" or "test".
        mean: Mean per channel on a scale of 0 to 1, as the backbone expects it.
        std: Standard deviation per channel, as the backbone expects it.
        augment: Apply a light random rotation, shift, scale and shear, drawn from torch's default generator.
        division: Draws other training and validation splits from the non-test images, for the choice of settings. The
            test split is always the same. Results are reported on division 0.

    Attributes:
        labels: Digit of each image, list of int.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ConfigError: `split` is unknown.
    """

    def __init__(
        self,
        split: Split,
        *,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        augment: bool = False,
        division: int = 0,
    ) -> None:
        if split not in ("train", "validation", "test"):
            raise ConfigError(f'split={split!r} must be "train", "validation" or "test".')
        pixels, digits = _scans()
        indices = _split_indices(digits, split, division)
        self.labels: list[int] = digits[indices].tolist()
        ink = torch.from_numpy(pixels[indices]).float().div(16)[:, None]
        ink = F.interpolate(ink, size=PIXELS, mode="bicubic", align_corners=False).clamp(0, 1)
        self._images = (PAPER - (PAPER - INK) * ink).expand(-1, 3, -1, -1)
        self._augment = v2.RandomAffine(10, (0.06, 0.06), (0.9, 1.1), 6, v2.InterpolationMode.BILINEAR, fill=PAPER)
        if not augment:
            self._augment = v2.Identity()
        self._normalize = v2.Normalize(list(mean), list(std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image: Tensor = self._normalize(self._augment(self._images[index]))
        return image, self.labels[index]


def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Load ink (1797, 8, 8) float64, from 0 to 16, and digits (1797,)."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise MissingExtraError('The digits are part of scikit-learn: pip install "lpt_peft[demo]".') from error
    bunch = load_digits()
    return bunch.images, bunch.target


def _split_indices(digits: np.ndarray, split: Split, division: int) -> np.ndarray:
    """Indices of a split, digit after digit."""
    fixed, divided = np.random.default_rng(_SPLIT_SEED), np.random.default_rng([_SPLIT_SEED, division])
    indices = []
    for digit, count in enumerate(digits_counts()):
        order = fixed.permutation(np.flatnonzero(digits == digit))
        test, others = order[:TEST_PER_CLASS], order[TEST_PER_CLASS:]
        if division:
            others = divided.permutation(others)
        splits = {"test": test, "train": others[:count], "validation": others[count : count + VALIDATION_PER_CLASS]}
        indices.append(splits[split])
    return np.concatenate(indices)
