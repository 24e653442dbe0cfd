"""Record of unreadable images, shared with worker processes, and the images that replace them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lpt_peft.data.sources import Images

MAX_NAMES = 5  # in a message
_logger = logging.getLogger("lpt_peft.data")


class UnreadableImages:
    """Positions of images that could not be read, in memory that worker processes share.

    Args:
        size: Number of images.

    Attributes:
        announce: Log the first unreadable image. The recipe sets it to False and reports all of them at the end.
    """

    def __init__(self, size: int) -> None:
        self._found = torch.zeros(size, dtype=torch.bool).share_memory_()
        self.announce = True

    def __contains__(self, position: int) -> bool:
        return bool(self._found[position])

    def contains(self, positions: np.ndarray) -> np.ndarray:
        """Whether each of `positions` (K,) was found unreadable."""
        found: np.ndarray = self._found.numpy()[positions]
        return found

    def positions(self) -> list[int]:
        """Positions found so far by any process, in ascending order."""
        found: list[int] = self._found.nonzero().flatten().tolist()
        return found

    def add(self, positions: Sequence[int], message: str | None = None) -> None:
        """Record positions; `message` is logged if they are the first."""
        if len(positions) == 1 and positions[0] in self:
            return  # known: a repeated draw must not scan the record
        if message and self.announce and not self._found.any():
            _logger.warning(message)
        self._found[list(positions)] = True

    def copy_from(self, other: UnreadableImages, positions: Sequence[int]) -> None:
        """Take over the record of the images at `positions` of another data set, which become 0, 1, ..."""
        self._found |= other._found[list(positions)]
        self.announce = other.announce


class ClassOrder:
    """For each image, the other images of its class in index order, cyclically.

    The images are sorted by class once, so that a lookup needs no scan of the data set.

    Args:
        labels: (N,) class of every image.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        classes = np.asarray(labels)
        self._rows = np.argsort(classes, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(classes))])

    def others(self, position: int, label: int) -> Iterator[np.ndarray]:
        """Iterate over the other images of class `label`, starting after `position`, in arrays of growing size.

        Few readable images are found by a few operations on arrays, and the first by a short array.

        Example:
            >>> list(ClassOrder([0, 1, 0, 0]).others(2, 0))
            [array([3]), array([0])]
        """
        rows = self._rows[self._starts[label] : self._starts[label + 1]]
        place = int(np.searchsorted(rows, position))
        size = 16
        for rest in (rows[place + 1 :], rows[:place]):
            while len(rest):
                yield rest[:size]
                rest, size = rest[size:], 4 * size  # noqa: PLW2901


def missing_files(images: Images) -> list[int]:
    """Positions of images whose file does not exist; images that are not files are passed over."""
    paths = ((position, images.path(position)) for position in range(len(images)))
    return [position for position, path in paths if path is not None and not os.path.isfile(path)]  # noqa: PTH113


def first_names(names: Sequence[str]) -> str:
    """Join the first names for a message."""
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def short_error(error: Exception) -> str:
    """Describe an exception in a short line."""
    text = str(error).rstrip(".") or "no message"
    return f"{type(error).__name__}: {text[:200]}"
