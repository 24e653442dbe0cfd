"""Names of training, validation and test splits: of folders, of columns in tables, and in Hugging Face data sets."""

from __future__ import annotations

import re
from collections.abc import Iterable

SPLITS = ("train", "validation", "test")
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_ADDITIONS = re.compile(r"^(images?|imgs?)|(images?|imgs?|data|dataset|set|split|folder)$")


def split_of(name: str) -> str | None:
    """Split that a name stands for: "train", "validation" or "test"; None for other names.

    Case, separators, a year, and words such as "set" or "images" do not matter.

    Example:
        >>> [split_of(name) for name in ("Train", "val2017", "test_set", "images-dev", "trains", "cat")]
        ['train', 'validation', 'test', 'validation', None, None]
    """
    word = re.sub(r"[\s_.-]+|(19|20)\d\d$", "", name.casefold())
    return _SPLIT_OF.get(word) or _SPLIT_OF.get(_ADDITIONS.sub("", word))


def by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names by their split, in the order of `SPLITS`; names of no split are left out."""
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in names:
        if split := split_of(name):
            found[split].append(name)
    return {split: group for split, group in found.items() if group}
