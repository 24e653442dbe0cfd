"""LabelledImages, the common data set class, with a policy for images that cannot be read.

Not here: image sources (`sources.py`), decoding (`files/reading.py`) and the validation of labels (`checks.py`).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

from torch.utils.data import Dataset

from lpt_peft._numbers import checked_integer
from lpt_peft.data._unreadable import MAX_NAMES, ClassOrder, UnreadableImages, first_names, missing_files, short_error
from lpt_peft.data.checks import ClassNames, checked_classes, look_alike_notes
from lpt_peft.data.files.reading import WHITE, Color, Reading, without_pillow_warnings
from lpt_peft.data.inspection.summary import DataSummary
from lpt_peft.data.sources import Images, SubsetSource
from lpt_peft.errors import ConfigError, InputError
from lpt_peft.samplers.checks import Labels

Unreadable = Literal["error", "skip"]
Verify = Literal["no", "exists", "decode"]


class Options(TypedDict, total=False):
    """Keyword arguments of every function that returns `LabelledImages`; see that class."""

    transform: Callable[[Any], Any] | None
    unreadable: Unreadable
    verify: Verify
    allow_empty: bool | Literal["infer"]
    exif: bool | None
    background: Color | None


class LabelledImages(Dataset[tuple[Any, int]]):
    """Images by index with their labels: a map-style dataset of (image, label) for any `torch.utils.data.DataLoader`.

    PIL images are converted to RGB by `lpt_peft.data.files.reading.Reading` before the transform sees them.

    An image that is missing or cannot be decoded is found when it is read, or earlier by `verify`. With
    `unreadable="error"` an error names it. With `unreadable="skip"` it is replaced by the next readable image of its
    class in index order, cyclically. Labels, counts and the indices that a sampler draws do not change, and the
    replacement depends on the files alone, not on seed, worker or time. `skipped` names all replaced images, including
    those found by worker processes; the first of them is logged by the logger "lpt_peft.data".

    Args:
        images: Image source.
        labels: Class of every image, (N,) integers from 0 to `C - 1`.
        class_names: (C,) in label order, or a mapping from label to name or from name to label; None uses the numbers
            as names, and the largest label plus one as `C`.
        transform: Called with the image; see `lpt_peft.data.transforms`. None returns RGB images.
        unreadable: "error" or "skip".
        verify: "no"; "exists" checks that every file exists; "decode" reads every image once, which takes as long as an
            epoch of reading.
        allow_empty: Accept classes without an image, and a single class, as in validation and test splits. "infer"
            does not need `class_names`: the largest label plus one is `C`, as for the check of a list.
        exif: Follow the EXIF orientation. None follows the transform, or True if the transform has no such setting.
        background: RGB colour behind transparent pixels; None follows the transform, or white.
        left_out: For the summary: files that are not images of the data set, for each reason.
        notes: For the summary: remarks on the data.

    Attributes:
        labels: Class of each image, list of N int, for samplers.
        class_names: List of C str.
        class_counts: Images per class, list of C int, for losses and metrics, including unreadable images.
        transform: The transform; may be assigned.
        images: The image source.
        unreadable_images: Record of the unreadable images.

    Raises:
        InputError: The labels are invalid (see `lpt_peft.data.checks`), their number differs from that of the images,
            or `verify` found images that cannot be read.
        ConfigError: An option is unknown, or `exif` or `background` contradict the transform.

    Example:
        >>> import numpy as np
        >>> from lpt_peft.data.sources import ArrayImages
        >>> pixels = np.zeros((4, 8, 8, 3), dtype=np.uint8)
        >>> data = LabelledImages(ArrayImages(pixels, "zeros"), [0, 0, 0, 1], ["cat", "dog"])
        >>> data.class_counts, len(data), data[3][1], data[3][0].size
        ([3, 1], 4, 1, (8, 8))
        >>> print(data.summary)
        4 images of 2 classes; largest class cat (3), smallest class dog (1)
    """

    def __init__(
        self,
        images: Images,
        labels: Labels,
        class_names: ClassNames | None = None,
        *,
        transform: Callable[[Any], Any] | None = None,
        unreadable: Unreadable = "error",
        verify: Verify = "no",
        allow_empty: bool | Literal["infer"] = False,
        exif: bool | None = None,
        background: Color | None = None,
        left_out: Mapping[str, Sequence[str]] | None = None,
        notes: Sequence[str] = (),
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
        self.images = images
        self._exif, self._background = exif, background
        self.transform = transform
        self._policy: Unreadable = unreadable
        self._left_out, notes = dict(left_out or {}), [*look_alike_notes(self.class_names), *notes]
        self._notes = list(dict.fromkeys(notes))
        self.unreadable_images = UnreadableImages(len(images))
        self._order: ClassOrder | None = None
        self._replacements: dict[int, int] = {}
        if verify != "no":
            self._verify(verify)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        position = range(len(self))[index]  # negative indices and IndexError as in a list
        image = self._read(position)
        return (image if self.transform is None else self.transform(image)), self.labels[position]

    @property
    def transform(self) -> Callable[[Any], Any] | None:
        """The transform; assigning it fails if it contradicts `exif` or `background`."""
        return self._transform

    @transform.setter
    def transform(self, transform: Callable[[Any], Any] | None) -> None:
        reading = getattr(transform, "reading", None)
        own = {"exif": self._exif, "background": self._background}
        for name, value in own.items():
            if value is not None and isinstance(reading, Reading) and getattr(reading, name) != value:
                raise ConfigError(
                    f"{name}={value!r} of the data contradicts {name}={getattr(reading, name)!r} of the transform; "
                    f"give {name} to transforms(...) alone."
                )
        self._transform = transform
        self.reading: Reading = (
            reading
            if isinstance(reading, Reading)
            else Reading(True if self._exif is None else self._exif, self._background or WHITE)
        )

    @property
    def skipped(self) -> list[str]:
        """Names of the images that any process has found unreadable so far, in index order."""
        return [self.images.name(position) for position in self.unreadable_images.positions()]

    @property
    def summary(self) -> DataSummary:
        """Images, classes, and what was left out or replaced so far."""
        return DataSummary(
            len(self), self.class_names, self.class_counts, self._left_out, tuple(self.skipped), tuple(self._notes)
        )

    def add_note(self, note: str) -> None:
        """Add a remark to the summary."""
        self._notes.append(note)

    def add_left_out(self, reason: str, files: Sequence[str]) -> None:
        """Add files that are not images of the data set to the summary."""
        self._left_out[reason] = [*self._left_out.get(reason, ()), *files]

    def skipped_report(self, effect: str = "other images of their classes replaced them") -> str | None:
        """Describe the unreadable images found so far: count, the first names and causes; None if there are none.

        The named images are read again to find their causes. `effect` says what happened to them.
        """
        positions = self.unreadable_images.positions()
        if not positions:
            return None
        names = []
        for position in positions[: MAX_NAMES + 1]:
            error = self._attempt(position)[1]
            names.append(self.images.name(position) + (f" ({short_error(error)})" if error else ""))
        return f"{len(positions)} of {len(self)} images cannot be read; {effect}: {first_names(names)}"

    def about(self) -> dict[str, Any]:
        """Checksums of class names and file names (plain JSON), which distinguish data sets with equal labels."""
        names = zlib.crc32(b"")
        for position in range(len(self)):
            name = os.path.basename(self.images.name(position))  # noqa: PTH119 - a Path per image is slow
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
        positions = [checked_integer("index", index, 0, len(self) - 1, InputError) for index in indices]
        subset = LabelledImages(
            SubsetSource(self.images, positions),
            [self.labels[position] for position in positions],
            self.class_names,
            transform=self.transform,
            unreadable=self._policy,
            allow_empty=allow_empty,
            exif=self._exif,
            background=self._background,
            left_out=self._left_out,
            notes=self._notes,
        )
        subset.unreadable_images.copy_from(self.unreadable_images, positions)
        return subset

    def _read(self, position: int) -> Any:
        image, error = self._attempt(position)
        if error is None:
            return image
        name = self.images.name(position)
        if self._policy == "error":
            raise InputError(
                f"{name} (index {position}) cannot be read: {short_error(error)}. Repair or remove it, or pass "
                'unreadable="skip" to replace it by another image of its class.'
            ) from error
        self.unreadable_images.add(
            [position],
            f"{name} (index {position}) cannot be read: {short_error(error)}. Another image of its class replaces it; "
            "`skipped` of the data set names all such images.",
        )
        for other in self._candidates(position):
            image, failure = self._attempt(other)
            if failure is None:
                self._replacements[position] = other
                return image
            self.unreadable_images.add([other])
        label = self.labels[position]
        raise InputError(
            f"Class {label} ({self.class_names[label]!r}) has no readable image, so {name} (index {position}) cannot "
            "be replaced. Repair an image of the class, or remove the class."
        ) from error

    def _attempt(self, position: int) -> tuple[Any, Exception | None]:
        try:
            with without_pillow_warnings():
                return self.reading(self.images.read(position)), None
        except MemoryError:
            raise  # not an error of the image
        except Exception as error:  # decoders raise all kinds of exceptions on broken bytes
            return None, error

    def _candidates(self, position: int) -> Iterator[int]:
        """Images to replace an image: the previous choice, then the class, unreadable images last."""
        if position in self._replacements:
            yield self._replacements[position]
        if self._order is None:
            self._order = ClassOrder(self.labels)
        label = self.labels[position]
        for known in (False, True):
            for others in self._order.others(position, label):
                yield from others[self.unreadable_images.contains(others) == known].tolist()

    def _verify(self, method: Verify) -> None:
        if method == "exists":
            broken = missing_files(self.images)
        else:
            broken = [position for position in range(len(self)) if self._attempt(position)[1] is not None]
        if not broken:
            return
        verb = "are missing" if method == "exists" else "cannot be read"
        names = first_names([self.images.name(position) for position in broken[: MAX_NAMES + 1]])
        found = f"{len(broken)} of {len(self)} images {verb}: {names}."
        if self._policy == "error":
            raise InputError(
                f'{found} Repair or remove them and check root, or pass unreadable="skip" to replace them by other '
                "images of their classes."
            )
        self.unreadable_images.add(broken, f"{found} Other images of their classes replace them.")
