"""Handwritten digits made long-tailed: scikit-learn's 1,797 real scans, drawn as dark ink on light paper.

A data set that needs no download, for demonstrations and tests. Needs scikit-learn: `lpt_peft[demo]`.
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

Part = Literal["train", "validation", "test"]
NUM_CLASSES, TEST_PER_CLASS, VALIDATION_PER_CLASS = 10, 50, 30
HEAD_COUNT, TAIL_COUNT = 120, 2
PIXELS, PAPER, INK = 32, 0.9, 0.1
_SPLIT_SEED = 0


def digits_counts() -> list[int]:
    """Training images of each digit: 120 for "0" falling exponentially to 2 for "9".

    Example:
        >>> digits_counts()
        [120, 76, 48, 30, 19, 12, 7, 4, 3, 2]
    """
    return exponential_counts(NUM_CLASSES, HEAD_COUNT, HEAD_COUNT / TAIL_COUNT)


class DigitsLT(Dataset[tuple[Tensor, int]]):
    """One part of the long-tailed digits; yields (image (3, 32, 32) float32, label).

    The split is fixed: of each digit, in an order shuffled by one seeded generator, the first 50 are
    test images, the next 120 ... 2 training images, and up to 30 of the rest are for validation.

    Args:
        part: "train", "validation" or "test".
        mean: Per channel, subtracted from values in 0 to 1; the backbone's own.
        std: Per channel, divided by; the backbone's own.
        augment: Light random rotation, shift, scale and shear, from torch's default generator.
        division: Draws another training and validation part from the same non-test images, for choosing
            settings; the test part is the same for all. 0 is the split that results are reported on.

    Attributes:
        labels: Digit of each image, list of int.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ConfigError: `part` is not one of the three.
    """

    def __init__(
        self,
        part: Part,
        *,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        augment: bool = False,
        division: int = 0,
    ) -> None:
        if part not in ("train", "validation", "test"):
            raise ConfigError(f'part={part!r} must be "train", "validation" or "test".')
        pixels, digits = _scans()
        chosen = _split(digits, part, division)
        self.labels: list[int] = digits[chosen].tolist()
        ink = torch.from_numpy(pixels[chosen]).float().div(16)[:, None]
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
    """Ink (1797, 8, 8) float64, 0 to 16, and digits (1797,)."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise MissingExtraError('The digits come with scikit-learn: pip install "lpt_peft[demo]".') from error
    bunch = load_digits()
    return bunch.images, bunch.target


def _split(digits: np.ndarray, part: Part, division: int) -> np.ndarray:
    """Indices of a part, digit after digit."""
    fixed, divided = np.random.default_rng(_SPLIT_SEED), np.random.default_rng([_SPLIT_SEED, division])
    chosen = []
    for digit, count in enumerate(digits_counts()):
        order = fixed.permutation(np.flatnonzero(digits == digit))
        test, rest = order[:TEST_PER_CLASS], order[TEST_PER_CLASS:]
        if division:
            rest = divided.permutation(rest)
        cuts = {"test": test, "train": rest[:count], "validation": rest[count : count + VALIDATION_PER_CLASS]}
        chosen.append(cuts[part])
    return np.concatenate(chosen)
