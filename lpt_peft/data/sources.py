"""Where images come from: files, arrays, another dataset, chosen rows of any of these.

A source knows how to read and how to name an image, and nothing else. Not here: labels, and what is done
when reading fails (`images.py`).
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


def as_rgb(image: Image.Image) -> Image.Image:
    """8 bits of red, green and blue; Pillow's own conversion would cut 16 bits of grey off at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def read_rgb(path: Path) -> Image.Image:
    """An image file, whole and decoded; whatever is wrong with it is raised here."""
    with path.open("rb") as file:
        return as_rgb(Image.open(file))


class Images(Protocol):
    """What `LabelledImages` needs of a source."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """The image, whole and decoded; whatever is wrong with it is raised here."""

    def name(self, index: int) -> str:
        """What a person would look for: a path, or a row of something."""

    def present(self, index: int) -> bool:
        """Tell quickly whether there is anything to read; True where only reading would tell."""


class PathList:
    """Paths in one block of bytes: 500,000 of them are two Python objects, which worker processes share untouched.

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
        """Add one path; bytes as the file system has them."""
        self._text += os.fsencode(path)
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        place = range(len(self))[index]
        start = self._ends[place - 1] if place else 0
        return os.fsdecode(bytes(self._text[start : self._ends[place]]))


class ImageFiles:
    """Files below a folder, read as RGB.

    Args:
        root: The folder.
        paths: Below it.

    Raises:
        InputError: `root` is no folder.
    """

    def __init__(self, root: str | os.PathLike[str], paths: PathList) -> None:
        if not Path(root).is_dir():
            raise InputError(f"root={os.fspath(root)!r} is no folder; pass the one that the paths start from.")
        self._root = os.fspath(root)
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Image.Image:
        """The image as RGB; orientation tags are not followed, as torchvision does not."""
        return read_rgb(Path(self.name(index)))

    def name(self, index: int) -> str:
        """The whole path."""
        return os.path.join(self._root, self._paths[index])  # noqa: PTH118 - a Path for each of 500,000 is slow

    def present(self, index: int) -> bool:
        """Whether the file is there."""
        return os.path.isfile(self.name(index))  # noqa: PTH113 - as above


class ArrayImages:
    """Images (N, H, W, 3) uint8 in memory.

    Args:
        pixels: The array; kept, not copied.
        source: What it is, for messages.
    """

    def __init__(self, pixels: np.ndarray, source: str) -> None:
        self._pixels = pixels
        self._source = source

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, index: int) -> Image.Image:
        """The image as RGB."""
        return Image.fromarray(self._pixels[index])

    def name(self, index: int) -> str:
        """The row."""
        return f"image {index} of {self._source}"

    def present(self, index: int) -> bool:
        """Always."""
        return True


class ItemImages:
    """The images of anything indexable that yields (image, ...) tuples, or dictionaries with an image under a key.

    Args:
        items: `len(items)` and `items[index]`.
        key: Of the image in an item: 0 in a tuple, a column's name in a dictionary.
        source: What it is, for messages.
    """

    def __init__(self, items: Any, key: int | str, source: str) -> None:
        self._items = items
        self._key = key
        self._source = source

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int) -> Any:
        """The image: RGB if it is PIL's, else as it is."""
        image = self._items[index][self._key]
        if image is None:
            raise ValueError("there is no image in this row")
        return as_rgb(image) if isinstance(image, Image.Image) else image

    def name(self, index: int) -> str:
        """The row."""
        return f"image {index} of {self._source}"

    def present(self, index: int) -> bool:
        """True: only reading would tell."""
        return True


class Chosen:
    """Some images of another source, in the order given."""

    def __init__(self, images: Images, indices: Sequence[int] | np.ndarray) -> None:
        self._images = images
        self._indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Any:
        """The image, as the other source reads it."""
        return self._images.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        """As the other source names it."""
        return self._images.name(int(self._indices[index]))

    def present(self, index: int) -> bool:
        """As the other source tells."""
        return self._images.present(int(self._indices[index]))
