"""Image lists: a text file with one "path label" a line, as Places-LT and ImageNet-LT come.

Paths may hold spaces: the label is what follows the last one. Not here: reading the images (`sources.py`).
"""

from __future__ import annotations

import codecs
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.sources import ImageFiles, PathList
from lpt_peft.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack


def image_list(
    list_file: str | os.PathLike[str],
    root: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
    **options: Unpack[Options],
) -> LabelledImages:
    """Images named by a list, for example `Places_LT_train.txt`.

    Args:
        list_file: UTF-8 text; every line a path, white space and a label from 0 to `C - 1`. Empty lines are
            passed over.
        root: Folder that the paths start from.
        class_names: (C,); None takes the numbers.
        **options: transform, unreadable, verify and allow_empty of `LabelledImages`.

    Raises:
        InputError: The list cannot be read or is empty, a line has no path or no label, `root` is no folder, or the
            labels break a rule of `LabelledImages`.
    """
    paths, labels = _read_list(Path(list_file))
    return LabelledImages(ImageFiles(root, paths), labels, class_names, **options)


def _read_list(list_file: Path) -> tuple[PathList, np.ndarray]:
    """Paths and labels (N,) int64, line by line: no list of all lines is made."""
    paths, labels = PathList(), array("q")
    try:
        with list_file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                fields = line.removeprefix(codecs.BOM_UTF8).rsplit(maxsplit=1)
                if fields:
                    labels.append(_label(fields, list_file, number))
                    paths.append(fields[0])
    except OSError as error:
        raise InputError(f"The image list {list_file} cannot be read: {error}.") from error
    if not paths:
        raise InputError(f'The image list {list_file} is empty; it needs a line "path label" for every image.')
    return paths, np.frombuffer(labels, dtype=np.int64)


def _label(fields: list[bytes], list_file: Path, number: int) -> int:
    label = fields[-1]
    if len(fields) == 2 and label.isdigit() and len(label) <= 18:  # 18 digits fit 64 bits
        return int(label)
    shown = b" ".join(fields)[-80:].decode("utf-8", "replace")
    raise InputError(
        f'{list_file}, line {number}: {shown!r} is not "path label" with a whole number of at least 0 as label. Write '
        "lines like: a/airfield/0001.jpg 0"
    )
