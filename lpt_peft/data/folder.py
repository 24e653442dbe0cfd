"""Class folders: one folder per class with its images at any depth, as torchvision's ImageFolder."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lpt_peft.data.checks import ClassNames, checked_names
from lpt_peft.data.files.formats import NO_ENDING, OTHER_ENDING
from lpt_peft.data.files.reading import identify, without_pillow_warnings
from lpt_peft.data.files.walk import CLOSED, OUTSIDE, ClassFolders
from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.sources import ImageFiles
from lpt_peft.data.split_names import by_split, split_of
from lpt_peft.errors import InputError, UnlabelledError

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SAMPLE = 20


def image_folder(
    root: str | os.PathLike[str],
    class_names: ClassNames | None = None,
    *,
    ignore: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    **options: Unpack[Options],
) -> LabelledImages:
    """Open the images below `root/<class>/`; labels number the classes in sorted order of their names.

    Images are the files with an ending that Pillow can read. Hidden and system entries are left out. A link to a folder
    that is counted elsewhere adds nothing. `summary` of the result names everything that was left out.

    Args:
        root: The folder of class folders.
        class_names: (C,) names of the folders in label order, or a mapping as in `LabelledImages`; None uses the
            existing folders, sorted. For a validation split pass those of the training set, with `allow_empty=True` if
            classes may be missing.
        ignore: A path or several: files and folders to leave out, such as the output of a run inside the data;
            absolute, or relative to `root`.
        **options: Options of `LabelledImages`.

    Raises:
        UnlabelledError: `root` contains images, but no class folder.
        InputError: `root` is not a folder or has no class folder, a folder is missing in `class_names`, the names of
            two folders differ only in their Unicode form, a class has no image, or folders are splits and not classes:
            all have names such as "train" and "Val", or a folder of such a name contains only folders.
    """
    if not Path(root).is_dir():
        raise InputError(
            f"root={os.fspath(root)!r} is not a folder; pass the folder that contains one folder per class."
        )
    found = ClassFolders(root, [ignore] if isinstance(ignore, (str, os.PathLike)) else ignore)
    if not found.class_names:
        _refuse_without_classes(root, found)
    names, labels, notes = _labels(root, found, class_names)
    if not len(found.paths):
        raise InputError(
            f"The class folders of {root} contain no image that Pillow can read. They contain: {_reasons(found)}."
        )
    counts = np.bincount(labels, minlength=len(names))
    empty = [name for name, count in zip(names, counts, strict=True) if not count and name in found.class_names]
    if empty and not options.get("allow_empty"):
        raise InputError(
            f"{len(empty)} of {len(names)} classes have no image; the first is label {names.index(empty[0])} "
            f"({empty[0]!r}), whose folder contains: {_reasons(found, empty[0])}. Remove the folder, or add images."
        )
    notes += _misnamed_notes(root, found)
    if empty:
        notes.append(f"class folders without an image: {', '.join(map(repr, empty[:5]))}")
    return LabelledImages(ImageFiles(root, found.paths), labels, names, left_out=found.left_out, notes=notes, **options)


def _refuse_without_classes(root: str | os.PathLike[str], found: ClassFolders) -> None:
    loose = len(found.left_out.get(OUTSIDE, ()))
    if loose:
        raise UnlabelledError(
            f"{root} has no class folder, but {loose} files; sort the images into one folder per class, or give a list."
        )
    detail = f" It contains: {_reasons(found)}." if found.left_out else ""
    raise InputError(f"{root} has no class folder; sort the images into one folder per class.{detail}")


def _misnamed_notes(root: str | os.PathLike[str], found: ClassFolders) -> list[str]:
    """Remark on files without an image ending that contain an image; a sample of each ending is opened."""
    notes = []
    for reason, files in found.left_out.items():
        if not reason.startswith((NO_ENDING, OTHER_ENDING)):
            continue
        sample = files[:_SAMPLE]
        images = [name for name in sample if _is_image(Path(root, name))]
        if images:
            notes.append(
                f"{len(images)} of {len(sample)} files that were opened contain images but are left out ({reason}), "
                f"such as {images[0]}: rename them to .jpg, .png or another ending of their format"
            )
    return notes


def _is_image(path: Path) -> bool:
    try:
        with path.open("rb") as stream, without_pillow_warnings():
            identify(stream)
    except Exception:  # decoders raise all kinds of exceptions
        return False
    return True


def _reasons(found: ClassFolders, class_name: str | None = None) -> str:
    """Count what was left out, in all or in a class folder."""
    counts = {reason: len(files) for reason, files in sorted(found.left_out.items())}
    if class_name is not None:
        start = class_name + os.sep
        counts = {reason: sum(file.startswith(start) for file in found.left_out[reason]) for reason in counts}
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "nothing"


def _labels(
    root: str | os.PathLike[str], found: ClassFolders, class_names: ClassNames | None
) -> tuple[list[str], np.ndarray, list[str]]:
    """Class names, labels (N,) and notes; folders are matched with `class_names` in the same Unicode form."""
    for same in _groups(found.class_names):
        raise InputError(
            f"{root} has class folders whose names look the same and differ only in their Unicode form: "
            f"{', '.join(map(ascii, same))}. Merge them, or rename a folder."
        )
    notes = []
    if CLOSED in found.left_out:
        notes.append(f"images may be missing: {len(found.left_out[CLOSED])} folders cannot be opened")
    if class_names is None:
        return found.class_names, found.labels, notes + _split_notes(root, found)
    names = checked_names(class_names)
    label_of = {_nfc(name): label for label, name in enumerate(names)}
    label_of |= {name: label for label, name in enumerate(names)}
    unknown = [name for name in found.class_names if name not in label_of and _nfc(name) not in label_of]
    if unknown:
        raise InputError(
            f"{root} has folders that are missing in class_names: {unknown[:5]}.{_nearly(unknown, names)} Remove, "
            "rename or add them."
        )
    new = np.array([label_of.get(name, label_of.get(_nfc(name), -1)) for name in found.class_names], dtype=np.int64)
    return names, new[found.labels], notes


def _split_notes(root: str | os.PathLike[str], found: ClassFolders) -> list[str]:
    """Remark on class folders with the name of a split.

    Raises:
        InputError: They are splits: there are no other folders, or one contains images only in several folders.
    """
    names = by_split(found.class_names)
    suspects = [name for group in names.values() for name in group]
    if not suspects:
        return []
    inside: dict[str, set[str]] = {name: set() for name in suspects}
    for path in found.paths:
        class_name, _, below = path.partition(os.sep)
        if class_name in inside:
            inside[class_name].add(below.partition(os.sep)[0] if os.sep in below else "")
    nested = [name for name, folders in inside.items() if len(folders) > 1 and "" not in folders]
    if nested or ("train" in names and all(map(split_of, found.class_names))):
        first = nested[0] if nested else names["train"][0]
        raise InputError(
            f"{root} has the folders {', '.join(found.class_names[:10])}, of which {', '.join(suspects)} look like "
            f"splits and not like classes. Pass {Path(root, first)}, or class_names= if they are classes."
        )
    return [f"class folders with the name of a split: {', '.join(map(repr, suspects))}"]


def _nearly(unknown: Sequence[str], names: Sequence[str]) -> str:
    known = {_nfc(name).casefold(): name for name in names}
    pairs = [(name, known[_nfc(name).casefold()]) for name in unknown if _nfc(name).casefold() in known]
    return f" {pairs[0][0]!r} differs from the class {pairs[0][1]!r} only by upper and lower case." if pairs else ""


def _groups(names: Iterable[str]) -> list[list[str]]:
    """Names that are equal in NFC, in groups of at least two."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_nfc(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)
