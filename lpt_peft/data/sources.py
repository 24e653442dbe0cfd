"""Image sources: files, arrays, other datasets, and subsets of them.

A source reads and names images. Not here: labels and unreadable images (`images.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lpt_peft.data.files.reading import open_image
from lpt_peft.errors import InputError

_SAMPLE = 20


class Images(Protocol):
    """Protocol of an image source."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """Read and decode an image in its own mode; every error of the decoder is raised here."""

    def name(self, index: int) -> str:
        """Name of an image for messages: a path, or a row of a table."""

    def path(self, index: int) -> str | None:
        """Path of the image; None if it is not a file of its own."""  # words: allow


class ImageFiles:
    """Files below a folder.

    Args:
        root: The folder.
        paths: Paths relative to the folder.

    Raises:
        InputError: `root` is not a folder.
    """

    def __init__(self, root: str | os.PathLike[str], paths: Sequence[str]) -> None:
        if not Path(root).is_dir():
            raise InputError(
                f"root={os.fspath(root)!r} is not a folder; pass the folder that the paths are relative to."
            )
        self._root = os.fspath(root)
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Image.Image:
        """Read and decode an image in its own mode."""
        return open_image(self.path(index))

    def name(self, index: int) -> str:
        """Path including the root."""
        return self.path(index)

    def path(self, index: int) -> str:
        """Path including the root."""
        return os.path.join(self._root, self._paths[index])  # noqa: PTH118 - a Path for each of 500,000 is slow

    def missing_notes(self) -> list[str]:
        """Remark if no file of a sample exists, which usually means another root."""
        sample = [self.path(index) for index in range(0, len(self), max(len(self) // _SAMPLE, 1))][:_SAMPLE]
        if any(Path(path).exists() for path in sample):
            return []
        hint = "; paths with \\ are those of Windows" if "\\" in sample[0] and os.sep == "/" else ""
        if not Path(sample[0]).suffix:
            hint = "; the paths have no ending such as .jpg"
        return [
            f"none of {len(sample)} files that were looked for exists below {self._root}, such as {sample[0]}{hint}"
        ]


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

    def path(self, index: int) -> None:
        """None: the image is in memory."""


class ItemImages:
    """Images of an indexable object that yields (image, ...) tuples, or dictionaries with an image under a key.

    An image is a PIL image, a tensor, the bytes of a file, or a dictionary of `bytes` and `path` as in `datasets`.

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
        """Return an image in its own mode; files are decoded."""
        item = self._items[index]
        if isinstance(item, dict) and self._key not in item:
            raise KeyError(f"the item is a dictionary with the keys {list(item)}; pass image_key=")
        image = item[self._key]
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if image is None:
            raise ValueError("there is no image in this row")
        if isinstance(image, (bytes, str, os.PathLike)):
            return open_image(image)
        return image

    def name(self, index: int) -> str:
        """Row of the object."""
        return f"image {index} of {self._source}"

    def path(self, index: int) -> None:
        """None: only the object can read the image."""


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

    def path(self, index: int) -> str | None:
        """Path of the image in the other source."""
        return self._images.path(int(self._indices[index]))
