"""DATA of the commands: from a word on the command line to the training, validation and test images.

    FOLDER              a folder for each class; or train/, val/ and test/ with such folders
    LIST.txt            "path label" lines, with --root, --val and --test
    FILE.json           iNaturalist 2018's annotations, with --root, --val and --test
    hf:NAME             a data set of Hugging Face `datasets`, of the Hub or saved in a folder, with a split "train"
    cifar100-lt:ROOT    the unpacked archive in ROOT; cifar10-lt as well, and cifar100-lt-50:ROOT for imbalance 50

Not here: reading them (`lpt_peft.data`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lpt_peft.cli.common.run_settings import ImageSettings
from lpt_peft.data.cifar import cifar_lt
from lpt_peft.data.folder import image_folder
from lpt_peft.data.huggingface import from_huggingface
from lpt_peft.data.image_list import image_list
from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.inaturalist import inaturalist
from lpt_peft.data.transforms import transforms
from lpt_peft.errors import InputError, MissingExtraError
from lpt_peft.recipe.loading.split import split_validation

_SPLITS = "hf:"
_CIFAR = re.compile(r"(cifar10|cifar100)-lt(?:-(\d+(?:\.\d+)?))?:(.+)")
PARTS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}


def open_parts(data: str, images: ImageSettings, seed: int) -> dict[str, LabelledImages]:
    """The parts to train with: "train", and "validation" and "test" as far as there are such; without transforms.

    Args:
        data: As on the command line.
        images: Where the other parts are, and how large a share to hold back.
        seed: Of that share.

    Raises:
        InputError: There is nothing of that kind, or it breaks a rule of `lpt_peft.data`.
    """
    parts: dict[str, LabelledImages]
    if data.startswith(_SPLITS):
        parts = _splits(data, images)
        if "train" not in parts:
            raise InputError(f'{data} has no split "train"; it has {", ".join(parts) or "none that is known"}.')
    elif match := _CIFAR.fullmatch(data):
        reader = partial(cifar_lt, match[3], match[1], float(match[2] or 100), unreadable=images.unreadable)  # type: ignore[arg-type]
        parts = {"train": reader(train=True), "test": reader(train=False)}
    else:
        path = _existing(data)
        folders = _subfolders(path)
        if folders and "train" not in folders:
            raise InputError(f"{data} holds {', '.join(place.name for place in folders.values())}, but no train.")
        parts = {"train": _read(folders.pop("train", path), images)}
        parts |= {name: _read(place, images, parts["train"].class_names) for name, place in folders.items()}
    given = {name: place for name, place in (("validation", images.val), ("test", images.test)) if place}
    parts |= {name: _read(place, images, parts["train"].class_names) for name, place in given.items()}
    if images.validation_share and "validation" not in parts:
        kept, held = split_validation(parts["train"].labels, images.validation_share, seed=seed)
        whole = parts["train"]
        parts["train"], parts["validation"] = whole.subset(kept), whole.subset(held, allow_empty=True)
    return parts


def open_test_parts(
    data: str, images: ImageSettings, seed: int, class_names: Sequence[str]
) -> dict[str, LabelledImages]:
    """The parts to measure a trained model with: "validation" and "test", or DATA itself as "test".

    Args:
        data: As on the command line; a folder of class folders or a list alone is one part, and may lack classes.
        images: As in `open_parts`.
        seed: As in `open_parts`.
        class_names: (C,) of the trained model.

    Raises:
        InputError: There is nothing of that kind, or its classes are not the model's.
    """
    whole = data.startswith(_SPLITS) or _CIFAR.fullmatch(data)
    if not whole and "train" not in _subfolders(_existing(data)):
        path = Path(data)
        folders = _subfolders(path) or {"test": path}
        return {name: _read(place, images, class_names) for name, place in folders.items()}
    parts = open_parts(data, replace(images, val=None, test=None), seed)
    if parts.pop("train").class_names != list(class_names):
        raise InputError(f"The classes of {data} are not those the model was trained on: {list(class_names)[:5]}, ...")
    return parts


def set_transforms(parts: Mapping[str, LabelledImages], preprocess: Mapping[str, Any], images: ImageSettings) -> None:
    """Random crops for training images, the backbone's evaluation for the others."""
    for name, part in parts.items():
        part.transform = transforms(
            preprocess,
            train=name == "train",
            scale=images.scale,
            ratio=images.ratio,
            flip=images.flip,
            crop_pct=images.crop_pct,
        )


def _splits(data: str, images: ImageSettings) -> dict[str, LabelledImages]:
    """The splits of a data set of Hugging Face, as far as their names say what they are for."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f'{data} needs datasets: pip install "lpt_peft[hf]".') from error
    name = data.removeprefix(_SPLITS)
    try:
        saved = any((Path(name) / file).exists() for file in ("dataset_dict.json", "dataset_info.json"))
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # of the network, the Hub, the disk or any builder
        raise InputError(f"{data} cannot be loaded: {type(error).__name__}: {str(error)[:300]}.") from error
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    parts = {}
    for part, words in PARTS.items():
        for word in words:
            if word in splits:
                try:
                    parts[part] = from_huggingface(
                        splits[word], unreadable=images.unreadable, allow_empty=part != "train"
                    )
                except InputError as error:
                    if part == "train":
                        raise
                    warnings.warn(f'The split "{word}" of {data} is left out: {error}', stacklevel=3)
    if any(part.class_names != parts["train"].class_names for part in parts.values() if "train" in parts):
        raise InputError(f"The splits of {data} do not name the same classes, so their labels would not agree.")
    return parts


def _existing(data: str) -> Path:
    path = Path(data)
    if not path.exists():
        raise InputError(
            f"{data!r} is neither a folder nor a file, nor like cifar100-lt:ROOT or hf:NAME. Give a folder of class "
            'folders, a list of "path label" lines, or a JSON of iNaturalist.'
        )
    return path


def _subfolders(path: Path) -> dict[str, Path]:
    """The folders of parts that `path` holds.

    One of these alone among other folders is a class as they are; train/ with val/ or test/ is not.

    Raises:
        InputError: One part has two folders.
    """
    found = {name: [path / word for word in words if (path / word).is_dir()] for name, words in PARTS.items()}
    if twice := [places for places in found.values() if len(places) > 1]:
        raise InputError(f"{' and '.join(map(str, twice[0]))} are for the same part: leave one of them.")
    parts = {name: places[0] for name, places in found.items() if places}
    if parts and ("train" not in parts or len(parts) == 1):
        entries = (entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        return {} if any(entry not in parts.values() for entry in entries) else parts
    return parts


def _read(path: Path, images: ImageSettings, class_names: Sequence[str] | None = None) -> LabelledImages:
    """One part; with `class_names`, those of the training part, it may lack classes."""
    options: Options = {"unreadable": images.unreadable, "allow_empty": class_names is not None}
    if path.is_dir():
        return image_folder(path, class_names, **options)
    root = images.root or path.parent
    if path.suffix == ".json":
        return inaturalist(path, root, class_names, **options)
    return image_list(path, root, class_names, **options)
