"""iNaturalist 2018: JSON annotation files with images, annotations and categories."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpt_peft.data.checks import ClassNames, checked_names, distinct_names
from lpt_peft.data.files.path_list import PathList
from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.sources import ImageFiles
from lpt_peft.errors import InputError, UnlabelledError

if TYPE_CHECKING:
    from typing_extensions import Unpack


def inaturalist(
    annotations: str | os.PathLike[str],
    root: str | os.PathLike[str],
    class_names: ClassNames | None = None,
    **options: Unpack[Options],
) -> LabelledImages:
    """Open the images of `train2018.json` or `val2018.json`, in the order of `images`.

    Label `j` is the category with the j-th smallest id. Both files list all categories, so their labels agree. Class
    names are the `name` of the categories; the 2018 files give numbers.

    Args:
        annotations: The JSON file: `images` with `id` and `file_name`, `annotations` with `image_id` and `category_id`,
            exactly one per image, and `categories` with `id`.
        root: Folder that each `file_name` is relative to; it contains `train_val2018`.
        class_names: (C,) names that the categories must have, for example those of the training set for a validation
            split; None accepts any.
        **options: Options of `LabelledImages`.

    Raises:
        UnlabelledError: The file has no annotations.
        InputError: The file cannot be read or has another format, an image has no annotation or several, an id is
            unknown, the categories differ from `class_names`, `root` is not a folder, or the labels are invalid for
            `LabelledImages`.
    """
    content = _read_json(Path(annotations))
    names = {category["id"]: str(category.get("name", category["id"])) for category in content["categories"]}
    label_of = {number: label for label, number in enumerate(sorted(names))}
    category_of: dict[Any, Any] = {}
    for image, category in content["annotations"]:
        if image in category_of:
            raise InputError(f"{annotations}: image {image} has two annotations; give exactly one class per image.")
        category_of[image] = category
    paths, labels = PathList(), []
    for image, file_name in content["images"]:
        if image not in category_of:
            raise InputError(f"{annotations}: image {image} ({file_name}) has no annotation; remove it from images.")
        category = category_of.pop(image)
        if category not in label_of:
            raise InputError(f"{annotations}: image {image} has category {category!r}, which is missing in categories.")
        paths.append(file_name)
        labels.append(label_of[category])
    if category_of:
        raise InputError(f"{annotations}: {len(category_of)} annotations refer to images that are missing in images.")
    if not labels:
        raise InputError(f"{annotations} lists no image.")
    found = distinct_names([names[number] for number in label_of])
    if class_names is not None and found != checked_names(class_names):
        raise InputError(
            f"{annotations} lists {len(found)} categories that differ from the {len(class_names)} of the training set, "
            "so their labels would not agree. List all categories in both files, in the same order of ids."
        )
    images = ImageFiles(root, paths)
    return LabelledImages(images, labels, found, notes=images.missing_notes(), **options)


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        with file.open("rb") as stream:
            content = json.load(stream, object_hook=_required_fields)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"The annotations {file} cannot be read: {error}.") from error
    tables: dict[str, Any] = content if isinstance(content, dict) else {}
    rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "images": ("id and file_name", lambda entry: isinstance(entry, tuple)),
        "annotations": ("image_id and category_id", lambda entry: isinstance(entry, tuple)),
        "categories": ("an integer as id", lambda entry: isinstance(entry, dict) and type(entry.get("id")) is int),
    }
    if tables.get("images") and "categories" in tables and not tables.get("annotations"):
        raise UnlabelledError(f"{file} has no annotations, as the test files of the competition.")
    for key, (fields, valid) in rules.items():
        entries = tables.get(key)
        if not isinstance(entries, list) or not all(valid(entry) for entry in entries):
            raise InputError(
                f"{file} is not an iNaturalist annotation file: {key!r} must be a list whose entries have {fields}."
            )
    return tables


def _required_fields(entry: dict[str, Any]) -> Any:
    """Keep only the required fields: half a million complete dictionaries would take a gigabyte."""
    if "image_id" in entry and "category_id" in entry:
        return entry["image_id"], entry["category_id"]
    if "id" in entry and "file_name" in entry:
        return entry["id"], entry["file_name"]
    return entry
