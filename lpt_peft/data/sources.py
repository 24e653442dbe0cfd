"""Image sources: files, arrays, other datasets, and subsets of them.

A source reads and names images. Not here: labels and unreadable images (`images.py`).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lpt_peft.errors import InputError


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; Pillow's own conversion would clip 16-bit grey at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def read_image(path: Path) -> Image.Image:
    """Read and decode an image file as RGB; every error of the decoder is raised here."""
    with path.open("rb") as file:
        return to_rgb(Image.open(file))


class Images(Protocol):
    """Protocol of an image source."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """Read and decode an image; every error of the decoder is raised here."""

    def name(self, index: int) -> str:
        """Name of an image for messages: a path, or a row of a table."""

    def present(self, index: int) -> bool:
        """Check quickly whether the image exists; True where only reading can decide."""


class PathList:
    """Paths in a single block of bytes, so that 500,000 paths are two Python objects that worker processes share.

    Example:
        >>> paths = PathList()
        >>> paths.append("a/1.jpg"), paths.append("b/2.jpg")
        (None, None)
        >>> len(paths), paths[1], list(paths)
        (2, 'b/2.jpg', ['a/1.jpg', 'b/2.jpg'])
    """

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q")

    def append(self, path: str | bytes) -> None:
        """Append a path; bytes are used as they are."""
        self._text += os.fsencode(path)
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        position = range(len(self))[index]
        start = self._ends[position - 1] if position else 0
        return os.fsdecode(bytes(self._text[start : self._ends[position]]))


class ImageFiles:
    """Files below a folder, read as RGB.

    Args:
        root: The folder.
        paths: Paths relative to the folder.

    Raises:
        InputError: `root` is not a folder.
    """

    def __init__(self, root: str | os.PathLike[str], paths: PathList) -> None:
        if not Path(root).is_dir():
            raise InputError(
                f"root={os.fspath(root)!r} is not a folder; pass the folder that the paths are relative to."
            )
        self._root = os.fspath(root)
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Image.Image:
        """Read an image as RGB; orientation tags are ignored, as in torchvision."""
        return read_image(Path(self.name(index)))

    def name(self, index: int) -> str:
        """Path including the root."""
        return os.path.join(self._root, self._paths[index])  # noqa: PTH118 - a Path for each of 500,000 is slow

    def present(self, index: int) -> bool:
        """Check whether the file exists."""
        return os.path.isfile(self.name(index))  # noqa: PTH113 - as above


class ArrayImages:
    """Images (N, H, W, 3) uint8 in memory.

    Args:
        pixels: The array; it is not copied.
        source: Description for messages.
    """

    def __init__(self, pixels: np.ndarray, source: str) -> None:
        self._pixels = pixels
        self._source = source

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, index: int) -> Image.Image:
        """Return an image as RGB."""
        return Image.fromarray(self._pixels[index])

    def name(self, index: int) -> str:
        """Row of the array."""
        return f"image {index} of {self._source}"

    def present(self, index: int) -> bool:
        """True for every row."""
        return True


class ItemImages:
    """Images of an indexable object that yields (image, ...) tuples, or dictionaries with an image under a key.

    Args:
        items: Has `len(items)` and `items[index]`.
        key: Position of the image in a tuple, or its column in a dictionary.
        source: Description for messages.
    """

    def __init__(self, items: Any, key: int | str, source: str) -> None:
        self._items = items
        self._key = key
        self._source = source

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int) -> Any:
        """Return an image: RGB if it is a PIL image, otherwise unchanged."""
        image = self._items[index][self._key]
        if image is None:
            raise ValueError("there is no image in this row")
        return to_rgb(image) if isinstance(image, Image.Image) else image

    def name(self, index: int) -> str:
        """Row of the object."""
        return f"image {index} of {self._source}"

    def present(self, index: int) -> bool:
        """True, because only reading can decide."""
        return True


class SubsetSource:
    """Images of another source at the given indices, in their order."""

    def __init__(self, images: Images, indices: Sequence[int] | np.ndarray) -> None:
        self._images = images
        self._indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Any:
        """Read an image of the other source."""
        return self._images.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        """Name of the image in the other source."""
        return self._images.name(int(self._indices[index]))

    def present(self, index: int) -> bool:
        """Check whether the image exists in the other source."""
        return self._images.present(int(self._indices[index]))
