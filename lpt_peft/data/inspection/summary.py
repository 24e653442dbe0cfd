"""DataSummary: images, classes, and everything that was left out or replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lpt_peft._text import number, printable

_NAMES, _NAME_LENGTH = 3, 120


@dataclass(frozen=True)
class DataSummary:
    """Summary of a data set; `str()` gives a few lines of text, `to_dict()` plain JSON.

    Args:
        images: Number of images.
        class_names: (C,) names.
        class_counts: (C,) images per class.
        left_out: For each reason, the files that are not images of the data set.
        unreadable: Images that could not be read so far; with `unreadable="skip"` others replace them.
        notes: Remarks on the data, such as classes whose names look alike.

    Example:
        >>> print(DataSummary(4, ["cat", "dog"], [3, 1], left_out={"not an image ending (.txt)": ["cat/notes.txt"]}))
        4 images of 2 classes; largest class cat (3), smallest class dog (1)
        1 left out: not an image ending (.txt): cat/notes.txt
    """

    images: int
    class_names: Sequence[str]
    class_counts: Sequence[int]
    left_out: Mapping[str, Sequence[str]]
    unreadable: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes, including those without an image."""
        return len(self.class_names)

    @property
    def largest(self) -> tuple[str, int]:
        """Name and count of the class with the most images."""
        label = max(range(self.num_classes), key=lambda label: self.class_counts[label])
        return self.class_names[label], self.class_counts[label]

    @property
    def smallest(self) -> tuple[str, int]:
        """Name and count of the class with the fewest images, at least 1."""
        present = [label for label in range(self.num_classes) if self.class_counts[label]]
        label = min(present, key=lambda label: self.class_counts[label])
        return self.class_names[label], self.class_counts[label]

    @property
    def empty(self) -> list[str]:
        """Names of the classes without an image."""
        return [name for name, count in zip(self.class_names, self.class_counts, strict=True) if not count]

    @property
    def num_left_out(self) -> int:
        """Number of files and folders that are not images of the data set."""
        return sum(len(files) for files in self.left_out.values())

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, *, with_left_out: bool = True) -> list[str]:
        """Lines of the text, with or without those about files that were left out."""
        (large, most), (small, fewest) = self.largest, self.smallest
        lines = [
            f"{number(self.images, 'image')} of {number(self.num_classes, 'class')}; largest class {_visible(large)} "
            f"({most}), smallest class {_visible(small)} ({fewest})"
        ]
        if self.empty:
            lines.append(f"{number(len(self.empty), 'class')} without an image: {_names(self.empty)}")
        lines += [
            f"{len(files)} left out: {printable(reason)}: {_names(files)}"
            for reason, files in sorted(self.left_out.items())
            if with_left_out
        ]
        if self.unreadable:
            lines.append(f"{len(self.unreadable)} cannot be read: {_names(self.unreadable)}")
        lines += [f"note: {printable(note, 1000)}" for note in self.notes]
        return lines

    def to_dict(self, names: int | None = None) -> dict[str, Any]:
        """Return the summary as plain JSON.

        Args:
            names: Largest number of file names per reason; None for all.
        """
        return {
            "images": self.images,
            "classes": self.num_classes,
            "largest": dict(zip(("class", "images"), self.largest, strict=True)),
            "smallest": dict(zip(("class", "images"), self.smallest, strict=True)),
            "empty": self.empty,
            "left_out": [
                {"reason": reason, "count": len(files), "files": list(files[:names])}
                for reason, files in sorted(self.left_out.items())
            ],
            "unreadable": {"count": len(self.unreadable), "files": list(self.unreadable[:names])},
            "notes": list(self.notes),
        }


def _visible(name: str) -> str:
    """A class name; in quotes where spaces or invisible characters would be lost."""
    plain = name.isprintable() and name == name.strip()
    return printable(name) if plain else printable(repr(name))


def _names(names: Sequence[str]) -> str:
    few = ", ".join(printable(name, _NAME_LENGTH) for name in names[:_NAMES])
    return few + (", ..." if len(names) > _NAMES else "")
