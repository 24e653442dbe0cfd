"""LabelledImages, the common data set class, with a policy for images that cannot be read.

Not here: image sources (`sources.py`) and the validation of labels (`checks.py`).
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch.utils.data import Dataset

from lpt_peft.data.checks import checked_classes
from lpt_peft.data.sources import Images, SubsetSource
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.samplers.checks import Labels, whole

Unreadable = Literal["error", "skip"]
Verify = Literal["no", "exists", "decode"]
_MAX_NAMES = 5  # in a message


class Options(TypedDict, total=False):
    """Keyword arguments of every function that returns `LabelledImages`; see that class."""

    transform: Callable[[Any], Any] | None
    unreadable: Unreadable
    verify: Verify
    allow_empty: bool


class LabelledImages(Dataset[tuple[Any, int]]):
    """Images by index with their labels: a map-style dataset of (image, label) for any `torch.utils.data.DataLoader`.

    An image that is missing or cannot be decoded is found when it is read, or earlier by `verify`. With
    `unreadable="error"` an error names it. With `unreadable="skip"` it is replaced by the next readable image of its
    class in index order, cyclically. Labels, counts and the indices that a sampler draws do not change, and the
    replacement depends on the files alone, not on seed, worker or time. `skipped` names all replaced images, including
    those found by worker processes.

    Args:
        images: Image source.
        labels: Class of every image, (N,) integers from 0 to `C - 1`.
        class_names: (C,); None uses the numbers as names, and the largest label plus one as `C`.
        transform: Called with the image; see `lpt_peft.data.transforms`. None returns images as they are read.
        unreadable: "error" or "skip".
        verify: "no"; "exists" checks that every file exists; "decode" reads every image once, which takes as long as an
            epoch of reading.
        allow_empty: Accept classes without an image, and a single class, as in validation and test splits.

    Attributes:
        labels: Class of each image, list of N int, for samplers.
        class_names: List of C str.
        class_counts: Images per class, list of C int, for losses and metrics, including unreadable images.
        transform: The transform; may be assigned.

    Raises:
        InputError: The labels are invalid (see `lpt_peft.data.checks`), their number differs from that of the images,
            or `verify` found images that cannot be read.
        ConfigError: An option is unknown.

    Example:
        >>> import numpy as np
        >>> from lpt_peft.data.sources import ArrayImages
        >>> pixels = np.zeros((4, 8, 8, 3), dtype=np.uint8)
        >>> data = LabelledImages(ArrayImages(pixels, "zeros"), [0, 0, 0, 1], ["cat", "dog"])
        >>> data.class_counts, len(data), data[3][1], data[3][0].size
        ([3, 1], 4, 1, (8, 8))
    """

    def __init__(
        self,
        images: Images,
        labels: Labels,
        class_names: Sequence[str] | None = None,
        *,
        transform: Callable[[Any], Any] | None = None,
        unreadable: Unreadable = "error",
        verify: Verify = "no",
        allow_empty: bool = False,
    ) -> None:
        if unreadable not in ("error", "skip"):
            raise ConfigError(f'unreadable={unreadable!r} must be "error" or "skip".')
        if verify not in ("no", "exists", "decode"):
            raise ConfigError(f'verify={verify!r} must be "no", "exists" or "decode".')
        self.labels, self.class_names, self.class_counts = checked_classes(labels, class_names, allow_empty)
        if len(images) != len(self.labels):
            raise InputError(
                f"{len(self.labels)} labels do not match {len(images)} images; give exactly one label per image."
            )
        self.transform = transform
        self._images = images
        self._unreadable: Unreadable = unreadable
        # In shared memory, so that this process sees the images that worker processes skip.
        self._skipped = torch.zeros(len(images), dtype=torch.bool).share_memory_()
        if verify != "no":
            self._verify(verify)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        position = range(len(self))[index]  # negative indices and IndexError as in a list
        image = self._read(position)
        return (image if self.transform is None else self.transform(image)), self.labels[position]

    @property
    def skipped(self) -> list[str]:
        """Names of the images that any process has found unreadable so far, in index order."""
        return [self._images.name(position) for position in self._skipped.nonzero().flatten().tolist()]

    def about(self) -> dict[str, Any]:
        """Checksums of class names and file names (plain JSON), which distinguish data sets with equal labels."""
        names = zlib.crc32(b"")
        for position in range(len(self)):
            name = os.path.basename(self._images.name(position))  # noqa: PTH119 - a Path per image is slow
            names = zlib.crc32(os.fsencode(name) + b"/", names)
        classes = zlib.crc32("/".join(self.class_names).encode())
        return {"class names_crc32": classes, "image names_crc32": names}

    def subset(self, indices: Sequence[int], *, allow_empty: bool = False) -> LabelledImages:
        """Select the images at `indices`, in that order, with the same classes, transform and options.

        Args:
            indices: Integers from 0 to `N - 1`, for example from `make_long_tailed`.
            allow_empty: Accept classes without an image.

        Raises:
            InputError: An index is out of range, or a class has no image.
        """
        positions = [whole("index", index, 0, len(self) - 1, InputError) for index in indices]
        subset = LabelledImages(
            SubsetSource(self._images, positions),
            [self.labels[position] for position in positions],
            self.class_names,
            transform=self.transform,
            unreadable=self._unreadable,
            allow_empty=allow_empty,
        )
        subset._skipped |= self._skipped[positions]
        return subset

    def _read(self, position: int) -> Any:
        image, error = self._attempt(position)
        if error is None:
            return image
        if self._unreadable == "error":
            raise InputError(
                f"{self._images.name(position)} (index {position}) cannot be read: {_short(error)}. Repair or remove "
                'it, or pass unreadable="skip" to replace it by another image of its class.'
            ) from error
        self._record(position, error)
        for other in self._same_class(position):
            image, failure = self._attempt(other)
            if failure is None:
                return image
            self._record(other, failure)
        label = self.labels[position]
        raise InputError(
            f"Class {label} ({self.class_names[label]!r}) has no readable image, so {self._images.name(position)} "
            f"(index {position}) cannot be replaced. Repair an image of the class, or remove the class."
        ) from error

    def _attempt(self, position: int) -> tuple[Any, Exception | None]:
        try:
            return self._images.read(position), None
        except MemoryError:
            raise  # not an error of the image
        except Exception as error:  # decoders raise all kinds of exceptions on broken bytes
            return None, error

    def _same_class(self, position: int) -> Iterator[int]:
        """Iterate over the other images of the class, starting after `position`."""
        size = len(self)
        rows = ((position + step) % size for step in range(1, size))
        return (row for row in rows if self.labels[row] == self.labels[position])

    def _record(self, position: int, error: Exception) -> None:
        if not self._skipped.any():
            warnings.warn(
                f"{self._images.name(position)} (index {position}) cannot be read: {_short(error)}. Another image of "
                "its class replaces it; `skipped` of the dataset names all such images. This warning appears once.",
                stacklevel=2,
            )
        self._skipped[position] = True

    def _verify(self, method: Verify) -> None:
        if method == "exists":
            broken = [position for position in range(len(self)) if not self._images.present(position)]
        else:
            broken = [position for position in range(len(self)) if self._attempt(position)[1] is not None]
        if not broken:
            return
        names = ", ".join(self._images.name(position) for position in broken[:_MAX_NAMES])
        names += ", ..." if len(broken) > _MAX_NAMES else ""
        found = (
            f"{len(broken)} of {len(self)} images {'are missing' if method == 'exists' else 'cannot be read'}: {names}."
        )
        if self._unreadable == "error":
            raise InputError(
                f'{found} Repair or remove them and check root, or pass unreadable="skip" to replace them by other '
                "images of their classes."
            )
        self._skipped[broken] = True
        warnings.warn(f"{found} Other images of their classes replace them.", stacklevel=3)


def _short(error: Exception) -> str:
    text = str(error) or "no message"
    return f"{type(error).__name__}: {text[:200]}"
