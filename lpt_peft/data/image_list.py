"""Image lists: text files with a path and a label per line, as published for Places-LT and ImageNet-LT."""

from __future__ import annotations

import codecs
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lpt_peft.data.files.path_list import PathList
from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.sources import ImageFiles
from lpt_peft.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack


def image_list(
    list_file: str | os.PathLike[str],
    root: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
    **options: Unpack[Options],
) -> LabelledImages:
    """Open the images of a list, for example `Places_LT_train.txt`.

    Args:
        list_file: Text with a path, white space and a label from 0 to `C - 1` per line. Paths may contain spaces. Empty
            lines are ignored.
        root: Folder that the paths are relative to.
        class_names: (C,); None uses the numbers.
        **options: Options of `LabelledImages`.

    Raises:
        InputError: The list cannot be read or is empty, a line has no path or no label, `root` is not a folder, or the
            labels are invalid for `LabelledImages`.
    """
    paths, labels = _read_list(Path(list_file))
    return LabelledImages(ImageFiles(root, paths), labels, class_names, **options)


def _read_list(list_file: Path) -> tuple[PathList, np.ndarray]:
    """Read paths and labels (N,) int64, line by line to save memory."""
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
        raise InputError(f'The image list {list_file} is empty; write a line "path label" for every image.')
    return paths, np.frombuffer(labels, dtype=np.int64)


def _label(fields: list[bytes], list_file: Path, number: int) -> int:
    label = fields[-1]
    if len(fields) == 2 and label.isdigit() and len(label) <= 18:  # 18 digits fit 64 bits
        return int(label)
    text = b" ".join(fields)[-80:].decode("utf-8", "replace")
    raise InputError(
        f'{list_file}, line {number}: {text!r} is not "path label" with an integer of at least 0 as label. Write '
        "lines like: a/airfield/0001.jpg 0"
    )
