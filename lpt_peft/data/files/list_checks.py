"""Checks of the labels and splits of image lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

from lpt_peft.errors import InputError


def spelling_notes(labels: Iterable[int], padded: Mapping[str, int]) -> list[str]:
    """Remark on integers that are written with different numbers of leading zeros: they are the same class.

    Args:
        labels: (N,) labels of the list.
        padded: Number of lines for each label that is written with leading zeros.

    Example:
        >>> spelling_notes([0, 1, 1], {"01": 1})
        ["labels that differ only in leading zeros are the same class, such as '01', '1'"]
    """
    if not padded:
        return []
    spellings: dict[int, dict[str, int]] = {}
    for text, count in padded.items():
        spellings.setdefault(int(text), {})[text] = count
    counts = Counter(labels)
    for label, found in spellings.items():
        if counts[label] > sum(found.values()):
            found[str(label)] = counts[label] - sum(found.values())
    merged = [sorted(found) for found in spellings.values() if len(found) > 1]
    if not merged:
        return []
    return [f"labels that differ only in leading zeros are the same class, such as {', '.join(map(repr, merged[0]))}"]


def refuse_several_splits(file: Path, splits: Set[tuple[str, str | None]]) -> None:
    """Refuse a table with rows of several splits.

    Args:
        file: The table, for the message.
        splits: Pairs of a column and a split that occurs in it; None stands for other values.

    Raises:
        InputError: A column has a split and other values.
    """
    for column in sorted({column for column, split in splits if split}):
        found = sorted(split or "others" for other, split in splits if other == column)
        if len(found) > 1:
            raise InputError(
                f"{file} has images of several splits, {', '.join(found)}, in the column {column!r}. Write a file for "
                "each split."
            )
