"""Data sets of the Hugging Face library `datasets` as LabelledImages; columns are found by their features."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpt_peft.data._split_choice import choose_splits, mentioned_splits
from lpt_peft.data.checks import ClassNames, checked_names
from lpt_peft.data.images import LabelledImages, Options
from lpt_peft.data.sources import ItemImages
from lpt_peft.data.split_names import SPLITS, by_split
from lpt_peft.errors import ConfigError, InputError, MissingExtraError, UnlabelledError

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SETTINGS = ("config", "revision", *SPLITS, "image", "label")


def from_huggingface(
    dataset: Any,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: ClassNames | None = None,
    **options: Unpack[Options],
) -> LabelledImages:
    """Wrap a split; its `set_format` and `set_transform` are ignored.

    Args:
        dataset: A `datasets.Dataset`, not a dictionary of splits and not streaming.
        image_column: None uses the only column with the feature `Image`. A column of paths or of encoded bytes may be
            given instead.
        label_column: None uses the only column with the feature `ClassLabel`, which also has the class names. A column
            of integers or of strings may be given instead; its class names are the numbers, or the sorted strings.
        class_names: (C,) names that the labels must have, those of the training split for a validation split; None
            uses those of the column.
        **options: Options of `LabelledImages`.

    Raises:
        UnlabelledError: No image has a label: all are -1 or None.
        InputError: The object is not a single map-style split, a column is missing, ambiguous or of another kind, the
            class names differ, or the labels are invalid for `LabelledImages`; -1 marks images without a label.
    """
    if isinstance(dataset, dict):
        raise InputError(f'This is a dictionary of splits, {sorted(dataset)}; pass a single split: dataset["train"].')
    if not (hasattr(dataset, "features") and hasattr(dataset, "__len__") and hasattr(dataset, "select_columns")):
        raise InputError(
            f"{type(dataset).__name__} is not a map-style datasets.Dataset; load it with streaming=False, or call "
            "from_dataset."
        )
    image_column = _column(dataset, image_column, "Image", "image")
    label_column = _column(dataset, label_column, "ClassLabel", "label")
    rows = dataset.with_format(None)
    labels, names = _labels(rows, label_column, class_names)
    images = rows.select_columns([image_column])
    feature = images.features[image_column]
    if getattr(feature, "decode", False) and not getattr(feature, "mode", None) and _is_local(images, image_column):
        # Files are decoded here, so that the settings exif and background apply.
        images = images.cast_column(image_column, type(feature)(decode=False))
    return LabelledImages(ItemImages(images, image_column, f"column {image_column!r}"), labels, names, **options)


def open_huggingface(
    source: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    **options: Unpack[Options],
) -> dict[str, LabelledImages]:
    """Load a data set of the Hub, or one that `save_to_disk` wrote, with its splits.

    A split without labels is left out, with a note in the summary of the training split. So is a validation or test
    split that was not chosen and has training images; chosen splits with the same images are noted in their summaries.

    Args:
        source: `NAME`, or `NAME,key=value,...` with the keys config, revision, train, validation, test, image and
            label, such as `uoft-cs/cifar100,label=fine_label`; a prefix `hf:` is ignored. NAME may be a folder.
        config: Configuration of the data set, where it has several.
        revision: Branch, tag or commit of the data set on the Hub.
        train: Split to train with; None uses "train". On the Hub also a slice, such as "train[:80%]".
        validation: Split for validation; None uses "validation", or another name of it such as "dev", where it exists.
        test: Split for the test; None uses "test" where it exists.
        image_column: As in `from_huggingface`.
        label_column: As in `from_huggingface`.
        **options: Options of `LabelledImages`. Classes of validation and test splits may be empty in any case.

    Returns:
        "train", and "validation" and "test" where they exist.

    Raises:
        MissingExtraError: `datasets` is not installed.
        ConfigError: A key of `source` is unknown or given twice, or `config` or `revision` are given for a folder.
        InputError: The data set cannot be loaded, a split is missing, or a split is invalid for `from_huggingface`.
    """
    name, settings = parse_source(source)
    chosen = {"train": train, "validation": validation, "test": test}
    chosen = {split: value or settings.get(split) for split, value in chosen.items()}
    loaded, notes = _load(name, config or settings.get("config"), revision or settings.get("revision"), chosen)
    columns = (image_column or settings.get("image"), label_column or settings.get("label"))
    splits = {"train": from_huggingface(loaded.pop("train"), *columns, **options)}
    names = splits["train"].class_names
    options["allow_empty"] = True
    for split, dataset in loaded.items():
        try:
            splits[split] = from_huggingface(dataset, *columns, names, **options)
        except UnlabelledError as error:  # noqa: PERF203 - at most two splits
            splits["train"].add_note(f'the split for "{split}" is left out: {error}')
    for split, note in notes:
        if split in splits:
            splits[split].add_note(note)
    return splits


def parse_source(source: str) -> tuple[str, dict[str, str]]:
    """Split `NAME,key=value,...` into the name and the settings.

    Raises:
        ConfigError: A key is unknown or given twice, or the name is missing.

    Example:
        >>> parse_source("hf:uoft-cs/cifar100,label=fine_label,train=train[:80%]")
        ('uoft-cs/cifar100', {'label': 'fine_label', 'train': 'train[:80%]'})
    """
    name, *pairs = re.split(r"\s*,\s*(?=\w+=)", source.removeprefix("hf:").strip())
    settings: dict[str, str] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in _SETTINGS or key in settings or not value:
            raise ConfigError(
                f"{source!r}: {pair!r} is unknown, empty or given twice. Write hf:NAME,key=value with the keys "
                f"{', '.join(_SETTINGS)}."
            )
        settings[key] = value
    if not name:
        raise ConfigError(f"{source!r} has no name; write hf:NAME.")
    return name, settings


def _load(
    name: str, config: str | None, revision: str | None, chosen: Mapping[str, str | None]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Load the splits by role, "train", "validation" and "test", and notes for the summaries of roles."""
    try:
        import datasets  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise MissingExtraError(f'{name} needs datasets: pip install "lpt_peft[hf]".') from error
    on_disk = any((Path(name) / file).exists() for file in ("dataset_dict.json", "dataset_info.json", "state.json"))
    if on_disk and (config or revision):
        raise ConfigError(f"{name} is a folder of save_to_disk, without config= and revision=. Leave them out.")
    with _as_input_error(f"{name} cannot be loaded"):
        loaded = datasets.load_from_disk(name) if on_disk else datasets.load_dataset(name, config, revision=revision)
    available = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    names = by_split(available)
    defaults = {role: role if role in available else names[role][0] for role in names}
    expressions, notes = choose_splits(chosen, defaults, {split: len(rows) for split, rows in available.items()})
    if unused := sorted(set(available) - mentioned_splits(expressions.values())):
        notes.append(("train", f"splits that are not used: {', '.join(unused)}"))
    found = {}
    for role in SPLITS:
        if expression := expressions.get(role):
            found[role] = available.get(expression)
            if found[role] is None and not on_disk and re.search(r"[\[+]", expression):
                with _as_input_error(f"The split {expression!r} of {name} cannot be loaded"):
                    found[role] = datasets.load_dataset(name, config, revision=revision, split=expression)
            elif found[role] is None:
                raise InputError(f"{name} has no split {expression!r}; its splits are {', '.join(available)}.")
    if "train" not in found:
        raise InputError(
            f'{name} has no split "train"; its splits are {", ".join(available)}. Choose: hf:NAME,train=SPLIT'
        )
    return found, notes


@contextmanager
def _as_input_error(text: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the network, the Hub, the disk or a builder
        hint = " Choose a configuration: hf:NAME,config=..." if "config" in str(error).lower() else ""
        raise InputError(f"{text}: {type(error).__name__}: {str(error)[:400].rstrip('.')}.{hint}") from error


def _column(dataset: Any, name: str | None, feature: str, argument: str) -> str:
    """Return the given column, or the only column with this feature."""
    if name is not None:
        if name not in dataset.features:
            raise InputError(f"{argument}_column={name!r} is not a column; the columns are {list(dataset.features)}.")
        return name
    # Compared by name, so that `datasets` is not imported here.
    found: dict[str, Any] = {
        column: kind for column, kind in dataset.features.items() if type(kind).__name__ == feature
    }
    if len(found) == 1:
        return next(iter(found))
    choice = f"Choose with {argument}_column=, or on the command line hf:NAME,{argument}=..."
    if not found:
        raise InputError(f"No column has the feature {feature}; the columns are {list(dataset.features)}. {choice}")
    classes = {column: getattr(kind, "num_classes", None) for column, kind in found.items()}
    described = ", ".join(f"{column!r} ({size} classes)" if size else repr(column) for column, size in classes.items())
    raise InputError(f"{len(found)} columns have the feature {feature}: {described}. {choice}")


def _labels(rows: Any, column: str, class_names: ClassNames | None) -> tuple[list[Any], list[str] | None]:
    """Labels (N,) and class names (C,) of a column of class labels, integers or strings."""
    labels = list(rows[column][:])
    if labels and all(label is None or label == -1 for label in labels):
        raise UnlabelledError(f"column {column!r} has no label: all values are -1 or missing")
    if any(isinstance(label, (list, dict)) for label in labels):
        raise InputError(f"Column {column!r} has several labels per image; a single class per image is needed.")
    if missing := sum(label is None for label in labels):
        raise InputError(
            f"Column {column!r} has no label for {missing} of {len(labels)} images; remove them by dataset.filter."
        )
    given = None if class_names is None else checked_names(class_names)
    names = getattr(rows.features[column], "names", None)
    if all(isinstance(label, str) for label in labels):
        found = sorted(set(labels))
        names = given or found
        if unknown := sorted(set(found) - set(names)):
            raise InputError(f"Column {column!r} has values that are missing in class_names: {unknown[:5]}.")
        label_of = {name: label for label, name in enumerate(names)}
        return [label_of[label] for label in labels], names
    if names is not None and given is not None and list(names) != given:
        raise InputError(
            f"Column {column!r} names other classes than the training split, so the labels would not agree: "
            f"{list(names)[:5]} and {given[:5]}."
        )
    return labels, given or names


def _is_local(images: Any, column: str) -> bool:
    """Whether files are embedded or on this disk; the library itself opens others."""
    if not len(images):
        return True
    feature = images.features[column]
    first = images.select([0]).cast_column(column, type(feature)(decode=False))[0][column]
    return first is None or bool(first.get("bytes")) or "://" not in (first.get("path") or "")
