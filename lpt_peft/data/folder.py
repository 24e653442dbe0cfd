"""Class folders: one folder per class with its images at any depth, as torchvision's ImageFolder."""

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
    """Open the images below `root/<class>/`; labels number the classes in sorted order of their names.

    Args:
        root: The folder of class folders.
        class_names: (C,) names of the folders in label order; None uses the existing folders, sorted. For a validation
            split pass those of the training set, with `allow_empty=True` if classes may be missing.
        **options: transform, unreadable, verify and allow_empty of `LabelledImages`.

    Raises:
        InputError: `root` is not a folder or has no class folder, a folder is missing in `class_names`, or a class has
            no image.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset  # noqa: PLC0415 - imported on use

    if not Path(root).is_dir():
        raise InputError(
            f"root={os.fspath(root)!r} is not a folder; pass the folder that contains one folder per class."
        )
    try:
        found, _ = find_classes(root)
    except FileNotFoundError as error:
        raise InputError(f"{root} has no class folder; sort the images into one folder per class.") from error
    found = [name for name in found if not name.startswith(".")]  # such as .ipynb_checkpoints
    label_of = {name: label for label, name in enumerate(found)}
    if not found:
        raise InputError(f"{root} has no class folder; sort the images into one folder per class.")
    if class_names is not None:
        if unknown := sorted(set(found) - set(class_names)):
            raise InputError(f"{root} has folders that are missing in class_names: {unknown[:5]}. Remove or add them.")
        label_of = {name: label for label, name in enumerate(class_names)}
    paths, labels = PathList(), []
    start = len(os.path.join(root, ""))  # noqa: PTH118 - a Path drops the final separator
    for path, label in make_dataset(os.fspath(root), label_of, IMG_EXTENSIONS, allow_empty=True):
        paths.append(path[start:])
        labels.append(label)
    if not labels:
        raise InputError(f"The class folders of {root} contain no image: no file ends in {', '.join(IMG_EXTENSIONS)}.")
    return LabelledImages(ImageFiles(root, paths), labels, list(label_of), **options)
