"""Compact lists of paths."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import overload


class PathList(Sequence[str]):
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
        self._text += path if isinstance(path, bytes) else os.fsencode(path)
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start = self._ends[position - 1] if position else 0
        return os.fsdecode(bytes(self._text[start : self._ends[position]]))
