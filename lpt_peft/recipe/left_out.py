"""left_out.json: every file of the splits of a run that was left out or could not be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lpt_peft.data.images import LabelledImages


def left_out_files(splits: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name the files that were left out or replaced, by split and reason, as plain JSON.

    Args:
        splits: Name and images of each split; splits other than `LabelledImages` are ignored.

    Returns:
        For each split with such files: "unreadable" with images that cannot be read, and "left_out" with files that are
        not images of the data set. Empty if there are none.
    """
    found = {}
    for name, split in splits.items():
        if not isinstance(split, LabelledImages):
            continue
        summary = split.summary.to_dict()
        if summary["unreadable"]["count"] or summary["left_out"]:
            found[name] = {key: summary[key] for key in ("unreadable", "left_out")}
    return found


def has_unreadable(splits: Mapping[str, Any]) -> bool:
    """Whether an image of a split was found unreadable, and so left out or replaced."""
    return any(isinstance(split, LabelledImages) and bool(split.skipped) for split in splits.values())
