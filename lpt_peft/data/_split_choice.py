"""Choice of the splits of a Hugging Face data set, and images that are in several of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lpt_peft.data.split_names import SPLITS

_SLICE = re.compile(r"\s*([^\[\]]+?)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\](?:\(\w+\))?)?\s*")


def choose_splits(
    chosen: Mapping[str, str | None], defaults: Mapping[str, str], sizes: Mapping[str, int]
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Expression of each role: as chosen, or the default if it has no image of the training split.

    Args:
        chosen: Expression of each role, such as "train[:80%]", or None.
        defaults: Split of each role that exists.
        sizes: Number of images of each split.

    Returns:
        Expression of each role, and notes: pairs of a role and a text.

    Example:
        >>> choose_splits({"train": "test"}, {"train": "train", "test": "test"}, {"train": 9, "test": 3})
        ({'train': 'test'}, [('train', 'the split "test" is not used for test: it has images of the training split')])
    """
    found = {role: expression for role in SPLITS if (expression := chosen.get(role) or defaults.get(role))}
    notes: list[tuple[str, str]] = []
    for role in ("validation", "test"):
        if role in found and not chosen.get(role) and _overlap(found[role], found.get("train", ""), sizes):
            note = f'the split "{found.pop(role)}" is not used for {role}: it has images of the training split'
            notes.append(("train", note))
    for role, expression in found.items():
        for other in SPLITS[: SPLITS.index(role)]:
            if count := _overlap(expression, found.get(other, ""), sizes):
                kind = "training images" if other == "train" else f"images of {other}"
                notes.append((role, f"{count} images are also {kind}: the splits are {expression} and {found[other]}"))
    return found, notes


def mentioned_splits(expressions: Iterable[str]) -> set[str]:
    """Names of the splits in expressions.

    Example:
        >>> sorted(mentioned_splits(["train[:80%]+extra", "test"]))
        ['extra', 'test', 'train']
    """
    return {match[1] for text in expressions for part in text.split("+") if (match := _SLICE.fullmatch(part))}


def _overlap(first: str, second: str, sizes: Mapping[str, int]) -> int:
    """Number of images that two expressions share; slices are those of `datasets`."""
    rows, others = _rows(first, sizes), _rows(second, sizes)
    return sum(
        max(min(end, other_end) - max(start, other_start), 0)
        for name, start, end in rows
        for other, other_start, other_end in others
        if name == other
    )


def _rows(expression: str, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    matches = [_SLICE.fullmatch(part) for part in expression.split("+")]
    return [
        (match[1], _bound(match[2], 0, sizes[match[1]]), _bound(match[3], sizes[match[1]], sizes[match[1]]))
        for match in matches
        if match and match[1] in sizes
    ]


def _bound(text: str | None, default: int, size: int) -> int:
    if text is None:
        return default
    value = round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)
    return min(max(value + size if value < 0 else value, 0), size)
