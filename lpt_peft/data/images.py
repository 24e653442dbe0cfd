"""LabelledImages: what every kind of data becomes, and what is done about images that cannot be read.

Not here: where images come from (`sources.py`) and what labels must be like (`checks.py`).
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch.utils.data import Dataset

from lpt_peft._numbers import checked_integer
from lpt_peft.data.checks import checked_classes
from lpt_peft.data.sources import Chosen, Images
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.samplers.checks import Labels

Unreadable = Literal["error", "skip"]
Verify = Literal["no", "exists", "decode"]
_SHOWN = 5  # names in a message


class Options(TypedDict, total=False):
    """What every function that gives `LabelledImages` takes besides; see there."""

    transform: Callable[[Any], Any] | None
    unreadable: Unreadable
    verify: Verify
    allow_empty: bool


class LabelledImages(Dataset[tuple[Any, int]]):
    """Images by index with their labels: a map-style dataset of (image, label) for any `torch.utils.data.DataLoader`.

    An image that is missing or cannot be decoded is met when it is read, or before if `verify` asks for it. Under
    `unreadable="error"` that raises, with its name. Under `unreadable="skip"` another image takes its place: the next
    readable one of the same class, in index order, after the last the first. So labels, counts and what a sampler
    draws stay as they are, and the stand-in depends on the files alone: not on seed, worker or time.
    Each image replaced is named in `skipped`, also those that worker processes met. `verify` changes nothing of this.

    Args:
        images: Where they come from.
        labels: Class of every image, (N,) whole numbers from 0 to `C - 1`.
        class_names: (C,); None takes the numbers as names, and the largest label plus one as `C`.
        transform: Called with the image alone; see `lpt_peft.data.transforms`. None gives images as they are read.
        unreadable: "error" or "skip".
        verify: "no"; "exists" looks for every file; "decode" reads every image once, for as long as that takes.
        allow_empty: Take classes without an image, and one class alone, as in validation and test parts.

    Attributes:
        labels: Class of each image, list of N int, for samplers.
        class_names: List of C str.
        class_counts: Images of each class, list of C int, for losses and metrics; unreadable ones count.
        transform: As given; may be assigned.

    Raises:
        InputError: The labels break a rule of `lpt_peft.data.checks`, are not as many as the images, or `verify` found
            images that cannot be read.
        ConfigError: A setting is unknown.

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
            raise InputError(f"{len(self.labels)} labels do not fit {len(images)} images; give one label for each.")
        self.transform = transform
        self._images = images
        self._unreadable: Unreadable = unreadable
        # Shared memory: what a worker process meets is seen here.
        self._skipped = torch.zeros(len(images), dtype=torch.bool).share_memory_()
        if verify != "no":
            self._verify(verify)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        place = range(len(self))[index]  # negative as in a list; IndexError beyond the end
        image = self._read(place)
        return (image if self.transform is None else self.transform(image)), self.labels[place]

    @property
    def skipped(self) -> list[str]:
        """Names of the images found unreadable so far, by any process, in index order; `len` counts them."""
        return [self._images.name(place) for place in self._skipped.nonzero().flatten().tolist()]

    def about(self) -> dict[str, Any]:
        """What tells these images from others of equal labels, plain JSON: class names, and a sum over file names."""
        names = zlib.crc32(b"")
        for place in range(len(self)):
            names = zlib.crc32(os.fsencode(os.path.basename(self._images.name(place))) + b"/", names)  # noqa: PTH119
        classes = zlib.crc32("/".join(self.class_names).encode())
        return {"class names_crc32": classes, "image names_crc32": names}

    def subset(self, indices: Sequence[int], *, allow_empty: bool = False) -> LabelledImages:
        """The images at `indices`, in that order, with the same classes, transform and policy.

        Args:
            indices: Whole numbers from 0 to `N - 1`, as from `make_long_tailed`.
            allow_empty: As for the whole.

        Raises:
            InputError: An index is out of range, or a class is left without an image.
        """
        places = [checked_integer("index", index, 0, len(self) - 1, InputError) for index in indices]
        part = LabelledImages(
            Chosen(self._images, places),
            [self.labels[place] for place in places],
            self.class_names,
            transform=self.transform,
            unreadable=self._unreadable,
            allow_empty=allow_empty,
        )
        part._skipped |= self._skipped[places]
        return part

    def _read(self, place: int) -> Any:
        image, error = self._attempt(place)
        if error is None:
            return image
        if self._unreadable == "error":
            raise InputError(
                f"{self._images.name(place)} (index {place}) cannot be read: {_short(error)}. Mend or remove it; or "
                'pass unreadable="skip" to take another image of its class instead.'
            ) from error
        self._note(place, error)
        for other in self._same_class(place):
            image, failed = self._attempt(other)
            if failed is None:
                return image
            self._note(other, failed)
        label = self.labels[place]
        raise InputError(
            f"Class {label} ({self.class_names[label]!r}) has no image that can be read, so nothing can stand in for "
            f"{self._images.name(place)} (index {place}). Mend one, or leave the class out."
        ) from error

    def _attempt(self, place: int) -> tuple[Any, Exception | None]:
        try:
            return self._images.read(place), None
        except MemoryError:
            raise  # not the image's fault
        except Exception as error:  # decoders raise anything at all on broken bytes
            return None, error

    def _same_class(self, place: int) -> Iterator[int]:
        """The other images of the class, starting behind `place`."""
        size = len(self)
        rows = ((place + step) % size for step in range(1, size))
        return (row for row in rows if self.labels[row] == self.labels[place])

    def _note(self, place: int, error: Exception) -> None:
        if not self._skipped.any():
            warnings.warn(
                f"{self._images.name(place)} (index {place}) cannot be read: {_short(error)}. Another image of its "
                "class stands in; `skipped` of the dataset names all such images. This is said once.",
                stacklevel=2,
            )
        self._skipped[place] = True

    def _verify(self, how: Verify) -> None:
        if how == "exists":
            broken = [place for place in range(len(self)) if not self._images.present(place)]
        else:
            broken = [place for place in range(len(self)) if self._attempt(place)[1] is not None]
        if not broken:
            return
        names = ", ".join(self._images.name(place) for place in broken[:_SHOWN])
        fault = "are missing" if how == "exists" else "cannot be read"
        told = f"{len(broken)} of {len(self)} images {fault}: {names}{', ...' if len(broken) > _SHOWN else ''}."
        if self._unreadable == "error":
            raise InputError(
                f'{told} Mend or remove them, check root; or pass unreadable="skip" to take other images of their '
                "classes instead."
            )
        self._skipped[broken] = True
        warnings.warn(f"{told} Other images of their classes stand in.", stacklevel=3)


def _short(error: Exception) -> str:
    text = str(error) or "no message"
    return f"{type(error).__name__}: {text[:200]}"
