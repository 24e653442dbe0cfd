"""Image lists: a path and a label per line, as published for Places-LT and ImageNet-LT, or a CSV table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lpt_peft.data.checks import ClassNames, checked_names
from lpt_peft.data.files.list_reader import TABLES, ImageTable, read_list, read_table
from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.sources import ImageFiles

if TYPE_CHECKING:
    from typing_extensions import Unpack


def image_list(
    list_file: str | os.PathLike[str],
    root: str | os.PathLike[str],
    class_names: ClassNames | None = None,
    *,
    path_column: str | None = None,
    label_column: str | None = None,
    **options: Unpack[Options],
) -> LabelledImages:
    """Open the images of a list, for example `Places_LT_train.txt`.

    Args:
        list_file: Text with a path, white space and a label from 0 to `C - 1` per line; paths may contain spaces. Or a
            table that ends in .csv or .tsv, with or without a header, whose labels may be class names.
        root: Folder that the paths are relative to.
        class_names: (C,) in label order, or a mapping as in `LabelledImages`; None uses the sorted names of a table,
            otherwise the numbers.
        path_column: Header of the column of paths in a table; None finds it.
        label_column: Header of the column of labels in a table; None finds it.
        **options: Options of `LabelledImages`.

    Raises:
        UnlabelledError: The list has paths, but no labels.
        InputError: The list cannot be read or is empty, a line has no path or no label, `root` is not a folder, or the
            labels are invalid for `LabelledImages`.
    """
    file, given = Path(list_file), None if class_names is None else checked_names(class_names)
    if file.suffix.lower() in TABLES:
        table = read_table(file, given, path_column, label_column)
    else:
        table = read_list(file, given, lambda path: Path(root, path).exists())
    images = ImageFiles(root, table.paths)
    labels = np.frombuffer(table.labels, dtype=np.int64)
    names = table.names if given is None else given
    notes = [*table.notes, *_repeated(table), *images.missing_notes()]
    return LabelledImages(images, labels, names, notes=notes, **options)


def _repeated(table: ImageTable) -> list[str]:
    """Remark on paths that occur several times; hashes are compared, because a set of all paths needs much memory."""
    paths, labels, hashes = table.paths, np.asarray(table.labels), np.asarray(table.hashes)
    order = np.argsort(hashes, kind="stable")
    pairs = order[np.flatnonzero(np.diff(hashes[order]) == 0)[:, None] + [0, 1]]
    pairs = np.array([pair for pair in pairs if paths[pair[0]] == paths[pair[1]]], dtype=np.int64).reshape(-1, 2)
    if not len(pairs):
        return []
    different = int((labels[pairs[:, 0]] != labels[pairs[:, 1]]).sum())
    return [f"{len(pairs)} lines repeat a path, {different} of them with another label, such as {paths[pairs[0][0]]}"]
