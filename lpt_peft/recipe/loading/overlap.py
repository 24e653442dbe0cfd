"""Images of an evaluation split that are also training images, found by path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from lpt_peft.data.images import LabelledImages


def overlap_note(training: Any, split: Any, name: str) -> str | None:
    """Describe how many images of a split are also training images; None if there are none.

    Images are compared by path, with links between folders resolved. Copies under other names are not found;
    `lpt-peft check` finds them by content.

    Args:
        training: Training images.
        split: Images of the split.
        name: Of the split, for the text.
    """
    if not (isinstance(training, LabelledImages) and isinstance(split, LabelledImages)):
        return None
    known = {path for path in _paths(training) if path is not None}
    shared = sum(path in known for path in _paths(split)) if known else 0
    if not shared:
        return None
    total = "1 image" if len(split) == 1 else f"{len(split)} images"
    verb, noun = ("is", "a training image") if shared == 1 else ("are", "training images")
    return (
        f"{shared} of {total} of the {name} split {verb} also {noun}, so its accuracy overstates that on new images. "
        "Give images that are not trained on."
    )


def _paths(images: LabelledImages) -> Iterator[tuple[str, str] | None]:
    """The real folder and the name of each image; None for images that are not files."""
    folders: dict[str, str] = {}  # a call for each image is slow
    for position in range(len(images)):
        path = images.images.path(position)
        if path is None:
            yield None
            continue
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        yield folders[folder], name
