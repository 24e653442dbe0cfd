"""The training, validation and test images that DATA of a command names.

    FOLDER              a folder for each class; or train/, val/ and test/ with such folders, also as Train/, eval/, ...
    LIST.txt            "path label" lines, with --root, --val and --test
    FILE.json           iNaturalist 2018's annotations, with --root, --val and --test
    hf:NAME,KEY=VALUE   a data set of Hugging Face `datasets`, of the Hub or saved in a folder; see `data.huggingface`
    cifar100-lt:ROOT    the unpacked archive in ROOT; cifar10-lt as well, and cifar100-lt-50:ROOT for imbalance 50

Not here: reading them (`lpt_peft.data`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from lpt_peft.cli.common.messages import notice
from lpt_peft.cli.common.run_settings import ImageSettings
from lpt_peft.data.cifar import cifar_lt
from lpt_peft.data.files.formats import image_endings
from lpt_peft.data.files.walk import HIDDEN, is_hidden
from lpt_peft.data.folder import image_folder
from lpt_peft.data.huggingface import open_huggingface
from lpt_peft.data.image_list import image_list
from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.inaturalist import inaturalist
from lpt_peft.data.split_names import by_split, split_of
from lpt_peft.data.transforms import transforms
from lpt_peft.errors import InputError
from lpt_peft.recipe.loading.split import split_validation

_HUGGING_FACE = "hf:"
_CIFAR = re.compile(r"(cifar10|cifar100)-lt(?:-(\d+(?:\.\d+)?))?:(.+)")
_OUTSIDE = "outside the splits"


def open_splits(data: str, images: ImageSettings, seed: int, *, allow_empty: bool = False) -> dict[str, LabelledImages]:
    """Open "train" and, where they exist, "validation" and "test"; without transforms.

    Args:
        data: As on the command line.
        images: Where the other splits are, and the share to hold out for validation.
        seed: Chooses the images that are held out.
        allow_empty: Accept a training split with a single class, or with classes that have no image; the classes of a
            list without names are counted by its labels.

    Raises:
        InputError: DATA is of no known kind, or breaks a rule of `lpt_peft.data`.
    """
    splits: dict[str, LabelledImages]
    if data.startswith(_HUGGING_FACE):
        splits = open_huggingface(data, unreadable=images.unreadable, allow_empty="infer" if allow_empty else False)
    elif match := _CIFAR.fullmatch(data):
        reader = partial(cifar_lt, match[3], match[1], float(match[2] or 100), unreadable=images.unreadable)  # type: ignore[arg-type]
        splits = {"train": reader(train=True), "test": reader(train=False)}
    else:
        path = _existing(data)
        folders = _split_folders(path)
        if folders and "train" not in folders:
            raise InputError(f"{data} holds {', '.join(folder.name for folder in folders.values())}, but no train.")
        others = _outside(path, folders) if folders else {}
        splits = {"train": _read(folders.pop("train", path), images, allow_empty="infer" if allow_empty else False)}
        for reason, names in others.items():
            splits["train"].add_left_out(reason, names)
        splits |= _read_labelled(folders, images, splits["train"].class_names)
    given = {name: path for name, path in (("validation", images.val), ("test", images.test)) if path}
    splits |= {name: _read(path, images, splits["train"].class_names) for name, path in given.items()}
    _note_shared_files(splits)
    if images.validation_share and "validation" not in splits:
        train = splits["train"]
        kept, held_out = split_validation(train.labels, images.validation_share, seed=seed)
        splits["train"], splits["validation"] = train.subset(kept), train.subset(held_out, allow_empty=True)
    return splits


def open_test_splits(
    data: str, images: ImageSettings, seed: int, class_names: Sequence[str]
) -> dict[str, LabelledImages]:
    """Open "validation" and "test" of DATA for a trained model; DATA without splits is a test split.

    Args:
        data: As on the command line; a folder of class folders, or a list, is one split and may lack classes.
        images: As in `open_splits`.
        seed: As in `open_splits`.
        class_names: Classes of the trained model, in order.

    Raises:
        InputError: DATA is of no known kind, or its classes are not the model's.
    """
    with_train = data.startswith(_HUGGING_FACE) or _CIFAR.fullmatch(data)
    if not with_train and "train" not in _split_folders(_existing(data)):
        path = Path(data)
        if folders := _split_folders(path):
            return _read_labelled(folders, images, class_names)
        return {"test": _read(path, images, class_names)}
    splits = open_splits(data, replace(images, val=None, test=None), seed)
    if splits.pop("train").class_names != list(class_names):
        raise InputError(f"The classes of {data} are not those the model was trained on: {list(class_names)[:5]}, ...")
    return splits


def open_foreign(path: Path, images: ImageSettings) -> LabelledImages:
    """Open a folder of class folders, or a list, with its own classes, of which some may have no image.

    Raises:
        InputError: The path does not exist, or its images have no labels.
    """
    return _read(_existing(str(path)), replace(images, root=None), allow_empty="infer")


def check_output(output: Path, data: str, images: ImageSettings) -> None:
    """Refuse an output folder in a place that is read for images: the next run would take it for a class or a split.

    Raises:
        InputError: `output` is in such a place.
    """
    place = output.resolve()
    for source in (data, images.val, images.test):
        path = Path(source or "").resolve()
        if source is None or not path.is_dir() or not place.is_relative_to(path):
            continue
        splits = _split_folders(path)
        if len(splits) < 2 or place == path or split_of(place.relative_to(path).parts[0]):
            raise InputError(
                f"--output {output} is in {source}, which is read for images: the next run would count it as a class. "
                f"Choose a folder outside, such as --output {path.with_name(f'{path.name}-run')}."
            )


def set_transforms(
    splits: Mapping[str, LabelledImages], preprocess: Mapping[str, Any], images: ImageSettings, *, crops: int = 1
) -> None:
    """Set random crops for training images, and the backbone's evaluation transform for the others."""
    for name, split in splits.items():
        split.transform = transforms(
            preprocess,
            train=name == "train",
            scale=images.scale,
            ratio=images.ratio,
            flip=images.flip,
            crop_pct=images.crop_pct,
            exif=images.exif,
            background=images.background,
            crops=crops,
        )


def _existing(data: str) -> Path:
    path = Path(data)
    if path.is_file() and path.suffix.lower() in image_endings():
        raise InputError(f"{data} is an image. Give the folder of class folders, or a list of images.")
    if not path.exists():
        raise InputError(
            f"{data!r} is neither a folder nor a file, nor of the form cifar100-lt:ROOT or hf:NAME. Give a folder of "
            'class folders, a list of "path label" lines, or a JSON of iNaturalist.'
        )
    return path


def _split_folders(path: Path) -> dict[str, Path]:
    """Find the folders of splits in `path`.

    Hidden and system folders do not count. A single folder of a split among other folders is left to `image_folder`,
    which accepts it as a class or refuses it; train/ with val/ or test/ is not a class.

    Raises:
        InputError: A split has two folders.
    """
    if not path.is_dir():
        return {}
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    found = by_split(folders)
    if ("train" not in found or len(found) == 1) and not all(map(split_of, folders)):
        return {}
    if repeated := [names for names in found.values() if len(names) > 1]:
        raise InputError(
            f"{' and '.join(str(path / name) for name in repeated[0])} are for the same split: keep a single folder."
        )
    return {split: path / names[0] for split, names in found.items()}


def _outside(path: Path, folders: Mapping[str, Path]) -> dict[str, list[str]]:
    """Entries of `path` beside the folders of splits, for each reason why they are left out."""
    found: dict[str, list[str]] = {}
    for entry in sorted(path.iterdir()):
        if entry not in folders.values():
            found.setdefault(HIDDEN if is_hidden(entry.name) else _OUTSIDE, []).append(str(entry))
    return found


def _note_shared_files(splits: Mapping[str, LabelledImages]) -> None:
    """Add a note to validation and test splits that contain files of the training split."""
    files = {name: _real_paths(split) for name, split in splits.items() if name != "train"}
    names = {os.path.basename(path) for paths in files.values() for path in paths}  # noqa: PTH119 - a Path is slow
    train = _real_paths(splits["train"], names) if names else set()
    for name, split in splits.items():
        if name != "train" and (shared := sorted(files[name] & train)):
            count = f"all {len(split)}" if len(shared) == len(split) else f"{len(shared)} of {len(split)}"
            split.add_note(
                f"{count} images are also training images, such as {shared[0]}: the accuracy on them says nothing "
                "about new images"
            )


def _real_paths(split: LabelledImages, names: Set[str] | None = None) -> set[str]:
    """Paths of the images, or of those with a file name in `names`; only links to folders are resolved: it is quick."""
    resolve = cache(os.path.realpath)
    paths = (split.images.path(position) for position in range(len(split)))
    parts = (path.rpartition(os.sep) for path in paths if path is not None)
    return {f"{resolve(folder or '.')}{os.sep}{name}" for folder, _, name in parts if names is None or name in names}


def _read_labelled(
    folders: Mapping[str, Path], images: ImageSettings, class_names: Sequence[str]
) -> dict[str, LabelledImages]:
    """Open the folders of splits that have class folders; name the others."""
    splits = {}
    for name, folder in folders.items():
        if any((folder / class_name).is_dir() for class_name in class_names):
            splits[name] = _read(folder, images, class_names)
        else:
            notice(f"{folder} has no folder of a class, so its images have no labels: it is left out.")
    return splits


def _read(
    path: Path,
    images: ImageSettings,
    class_names: Sequence[str] | None = None,
    *,
    allow_empty: bool | Literal["infer"] = True,
) -> LabelledImages:
    """Open a split; `class_names` are those of the training split."""
    options: Options = {"unreadable": images.unreadable, "allow_empty": allow_empty}
    if path.is_dir():
        return image_folder(path, class_names, **options)
    root = images.root or path.parent
    if path.suffix == ".json":
        return inaturalist(path, root, class_names, **options)
    return image_list(path, root, class_names, **options)
