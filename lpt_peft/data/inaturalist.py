"""iNaturalist 2018: the competition's JSON with images, annotations and categories.

Not here: reading the images (`sources.py`). Needs no pycocotools.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.sources import ImageFiles, PathList
from lpt_peft.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack


def inaturalist(
    annotations: str | os.PathLike[str],
    root: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
    **options: Unpack[Options],
) -> LabelledImages:
    """Images of `train2018.json` or `val2018.json`, in the order of its `images`.

    Label `j` is the category with the j-th smallest id; both files list all categories, so labels agree. Names are the
    categories' `name`, which the 2018 files give as numbers.

    Args:
        annotations: The JSON: `images` with `id` and `file_name`, `annotations` with `image_id` and `category_id`, one
            for each image, `categories` with `id`.
        root: Folder that each `file_name` starts from; it holds `train_val2018`.
        class_names: (C,) that the file must have, those of the training set for a validation part; None takes it as it
            is.
        **options: transform, unreadable, verify and allow_empty of `LabelledImages`.

    Raises:
        InputError: The file cannot be read or is of another format, an image has no annotation or two, an id is
            unknown, the categories are not `class_names`, `root` is no folder, or the labels break a rule of
            `LabelledImages`.
    """
    content = _read_json(Path(annotations))
    names = {category["id"]: str(category.get("name", category["id"])) for category in content["categories"]}
    label_of = {number: label for label, number in enumerate(sorted(names))}
    category_of: dict[Any, Any] = {}
    for image, category in content["annotations"]:
        if image in category_of:
            raise InputError(f"{annotations}: image {image} has two annotations; one class for each image is needed.")
        category_of[image] = category
    paths, labels = PathList(), []
    for image, file_name in content["images"]:
        if image not in category_of:
            raise InputError(f"{annotations}: image {image} ({file_name}) has no annotation; leave it out of images.")
        category = category_of.pop(image)
        if category not in label_of:
            raise InputError(f"{annotations}: image {image} has category {category!r}, which is not in categories.")
        paths.append(file_name)
        labels.append(label_of[category])
    if category_of:
        raise InputError(f"{annotations}: {len(category_of)} annotations are of images that are not in images.")
    if not labels:
        raise InputError(f"{annotations} lists no image.")
    found = [names[number] for number in label_of]
    if class_names is not None and found != list(class_names):
        raise InputError(
            f"{annotations} lists {len(found)} categories that are not the {len(class_names)} of the training set, so "
            "their labels would not agree. List all categories in both files, in the same order of ids."
        )
    return LabelledImages(ImageFiles(root, paths), labels, found, **options)


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        with file.open("rb") as stream:
            content = json.load(stream, object_hook=_needed)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"The annotations {file} cannot be read: {error}.") from error
    parts: dict[str, Any] = content if isinstance(content, dict) else {}
    rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "images": ("id and file_name", lambda entry: isinstance(entry, tuple)),
        "annotations": ("image_id and category_id", lambda entry: isinstance(entry, tuple)),
        "categories": ("a whole number as id", lambda entry: isinstance(entry, dict) and type(entry.get("id")) is int),
    }
    for key, (fields, fine) in rules.items():
        entries = parts.get(key)
        if not isinstance(entries, list) or not all(fine(entry) for entry in entries):
            raise InputError(
                f"{file} is no iNaturalist annotation file: {key!r} must be a list whose entries have {fields}. The "
                "test files of the competition have no annotations."
            )
    return parts


def _needed(entry: dict[str, Any]) -> Any:
    """An image or annotation without what is not needed here: half a million dictionaries would take a gigabyte."""
    if "image_id" in entry and "category_id" in entry:
        return entry["image_id"], entry["category_id"]
    if "id" in entry and "file_name" in entry:
        return entry["id"], entry["file_name"]
    return entry
