"""Class folders: one folder for each class, named after it, with its images at any depth, as torchvision's ImageFolder.

Not here: reading the images (`sources.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.sources import ImageFiles, PathList
from lpt_peft.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack


def image_folder(
    root: str | os.PathLike[str], class_names: Sequence[str] | None = None, **options: Unpack[Options]
) -> LabelledImages:
    """Images below `root/<class>/`; labels number the classes in sorted order of their names, hidden folders left out.

    Args:
        root: The folder of class folders.
        class_names: (C,) names of the folders in label order; None takes those there are, sorted. For a validation part
            pass the training set's, with `allow_empty=True` if classes may be missing.
        **options: transform, unreadable, verify and allow_empty of `LabelledImages`.

    Raises:
        InputError: `root` is no folder or holds no class folder, a folder is not among `class_names`, there is no
            image, or a class has none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset  # noqa: PLC0415 - where used

    if not Path(root).is_dir():
        raise InputError(f"root={os.fspath(root)!r} is no folder; pass the one that holds a folder for each class.")
    try:
        found, _ = find_classes(root)
    except FileNotFoundError as error:
        raise InputError(f"{root} holds no class folder; sort the images into one folder for each class.") from error
    found = [name for name in found if not name.startswith(".")]  # such as .ipynb_checkpoints
    label_of = {name: label for label, name in enumerate(found)}
    if not found:
        raise InputError(f"{root} holds no class folder; sort the images into one folder for each class.")
    if class_names is not None:
        if unknown := sorted(set(found) - set(class_names)):
            raise InputError(f"{root} holds folders that are no class: {unknown[:5]}. Remove them or mend class_names.")
        label_of = {name: label for label, name in enumerate(class_names)}
    paths, labels = PathList(), []
    start = len(os.path.join(root, ""))  # noqa: PTH118 - with the separator, which a Path drops
    for path, label in make_dataset(os.fspath(root), label_of, IMG_EXTENSIONS, allow_empty=True):
        paths.append(path[start:])
        labels.append(label)
    if not labels:
        raise InputError(f"The class folders of {root} hold no image: no file ends in {', '.join(IMG_EXTENSIONS)}.")
    return LabelledImages(ImageFiles(root, paths), labels, list(label_of), **options)
