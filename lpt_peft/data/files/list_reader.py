"""Readers of image lists: text with a path and a label per line, and CSV or TSV tables."""

from __future__ import annotations

import codecs
import csv
import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from lpt_peft.data.files.formats import image_endings
from lpt_peft.data.files.list_checks import refuse_several_splits, spelling_notes
from lpt_peft.data.files.path_list import PathList
from lpt_peft.data.split_names import split_of
from lpt_peft.errors import InputError, UnlabelledError

TABLES = (".csv", ".tsv")
_MAX_DIGITS = 18  # fit 64 bits
_QUOTES_AND_SPACES = b"\"' \t\v\f"
_EXAMPLE = "Write lines like: a/airfield/0001.jpg 0"
_PATH_COLUMNS = {"path", "file", "filename", "filepath", "image", "imagepath", "img", "imgpath", "imagename", "fname"}
_SPLIT_COLUMNS = {"split", "splits", "subset", "set", "partition", "phase", "usage", "dataset", "fold"}
_ZERO = ord("0")
_LABEL_COLUMNS = {"label", "class", "target", "category", "labels", "classid", "labelid", "classname", "y"}


@dataclass(frozen=True)
class ImageTable:
    """Paths, their hashes and labels (N,) of a list; where it has names, labels are positions in `names`."""

    paths: PathList
    hashes: array[int]
    labels: array[int]
    names: list[str] | None = None
    notes: Sequence[str] = ()


def read_list(file: Path, class_names: Sequence[str] | None, exists: Callable[[str], bool]) -> ImageTable:
    """Read lines of a path, white space and a label; line by line, to save memory.

    Args:
        file: The list. Paths may contain spaces, and may be quoted.
        class_names: (C,) names that may be written instead of integers.
        exists: Whether a path is that of a file; called only for lines that look wrong.

    Raises:
        UnlabelledError: The first line is the path of an image without a label.
        InputError: The list cannot be read or is empty, or a line has no path or no label.
    """
    paths, hashes, labels = PathList(), array("q"), array("q")
    add_path, add_hash, add_label = paths.append, hashes.append, labels.append  # this loop is the time of long lists
    label_of = {name: label for label, name in enumerate(class_names or ())}
    padded: Counter[bytes] = Counter()
    endings = image_endings()
    with _reported(file), file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                _refuse_utf16(file, line)
                line = line.removeprefix(codecs.BOM_UTF8)  # noqa: PLW2901
            fields = line.rsplit(maxsplit=1)
            if not fields:
                continue
            path, label = fields[0], fields[-1]
            if len(fields) < 2 or not label.isdigit() or len(label) > _MAX_DIGITS:
                number_of_name = label_of.get(_decoded(label)) if len(fields) == 2 else None
                if number_of_name is None:
                    raise _bad_line(_place(file, number, fields), [_decoded(field) for field in fields], not paths)
                add_label(number_of_name)
            else:
                add_label(int(label))
                if label[0] == _ZERO and len(label) > 1:
                    padded[label] += 1
            if path[0] in _QUOTES_AND_SPACES:
                path = _unquoted(path.strip())
            if b" " in path:
                _check_columns(_place(file, number, fields), _decoded(path), _decoded(label), exists, endings)
            add_hash(hash(path))
            add_path(path)
    notes = spelling_notes(labels, Counter({_decoded(text): count for text, count in padded.items()}))
    return _not_empty(file, ImageTable(paths, hashes, labels, notes=notes))


def read_table(
    file: Path, class_names: Sequence[str] | None, path_column: str | None, label_column: str | None
) -> ImageTable:
    """Read a CSV or TSV file with a column of paths and a column of labels, integers or class names.

    Args:
        file: UTF-8 text with or without a header.
        class_names: (C,) names that labels may have; None uses the sorted names of the file, if it has names.
        path_column: Header of the column of paths; None finds it.
        label_column: Header of the column of labels; None finds it.

    Raises:
        InputError: The file cannot be read or is empty, the columns are unknown, a row has no label, or a column
            such as "split" has the names of several splits.
    """
    paths, texts = PathList(), []
    splits: set[tuple[str, str | None]] = set()
    with _reported(file), file.open("rb") as stream:
        _refuse_utf16(file, stream.readline())
    with _reported(file), file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        rows = csv.reader(stream, delimiter=_delimiter(file, stream.readline()))
        stream.seek(0)
        filled = ([cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row))
        first, second = next(filled, []), next(filled, [])
        if not first:
            raise InputError(f'The image list {file} is empty; write a row "path,label" for every image.')
        columns, has_header = _columns(file, first, second or first, path_column, label_column)
        split_columns = [place for place, cell in enumerate(first) if _plain(cell) in _SPLIT_COLUMNS and has_header]
        for row in chain([] if has_header else [first], [second] if second else [], filled):
            cells = [row[column] if column < len(row) else "" for column in columns]
            if not all(cells):
                raise InputError(f"{file}, line {rows.line_num}: {_short(','.join(row))!r} has no path or no label.")
            paths.append(cells[0])
            texts.append(cells[1])
            splits.update((first[place], split_of(row[place])) for place in split_columns if place < len(row))
    refuse_several_splits(file, splits)
    table = _numbered(file, paths, texts, class_names)
    if has_header:
        unread = ", ".join(cell for place, cell in enumerate(first) if place not in columns)
        note = f"the first row is read as a header: {', '.join(first)}" + (f"; not used: {unread}" if unread else "")
        table = replace(table, notes=[note, *table.notes])
    return _not_empty(file, table)


def _numbered(file: Path, paths: PathList, texts: list[str], class_names: Sequence[str] | None) -> ImageTable:
    """Convert labels to integers; names are numbered in sorted order, or as in `class_names`."""
    hashes = array("q", map(hash, paths))
    integers = [_label(text.encode(errors="surrogateescape")) for text in texts]
    if number := next((text for text in texts if re.fullmatch(r"-\d+|-?\d*\.\d*", text)), None):
        raise InputError(
            f"{file} has the label {number!r}. Write labels as integers of at least 0, and remove rows of images "
            "without a label."
        )
    if all(label is not None for label in integers):
        labels = array("q", [label for label in integers if label is not None])
        padded = Counter(text for text in texts if text[0] == "0" and len(text) > 1)
        return ImageTable(paths, hashes, labels, notes=spelling_notes(labels, padded))
    names = [str(name) for name in class_names] if class_names is not None else sorted(set(texts))
    label_of = {name: label for label, name in enumerate(names)}
    numbers = [text for text, label in zip(texts, integers, strict=True) if label is not None]
    if class_names is None and numbers:
        word = next(text for text, label in zip(texts, integers, strict=True) if label is None)
        raise InputError(
            f"{file} has both integers and names as labels, such as {numbers[0]!r} and {_short(word)!r}. Write "
            "integers of at least 0 or names in all rows."
        )
    if unknown := sorted({text for text in texts if text not in label_of}):
        raise InputError(f"{file} has labels that are missing in class_names: {unknown[:5]}. Rename or add them.")
    return ImageTable(paths, hashes, array("q", [label_of[text] for text in texts]), names)


def _plain(header: str) -> str:
    return "".join(filter(str.isalnum, header.lower()))


def _columns(
    file: Path, first: list[str], second: list[str], path_column: str | None, label_column: str | None
) -> tuple[tuple[int, int], bool]:
    """Positions of paths and labels, and whether the first row is a header."""
    endings = image_endings()
    images, images_below = (
        [place for place, cell in enumerate(row) if Path(cell).suffix.lower() in endings] for row in (first, second)
    )
    given = {"path_column": path_column, "label_column": label_column}
    for argument, name in given.items():
        if name is not None and name not in first:
            raise InputError(f"{file} has no column {argument}={name!r}; the columns are {first}.")
    plain = [_plain(cell) for cell in first]
    found = {
        "path_column": [place for place, cell in enumerate(plain) if cell in _PATH_COLUMNS],
        "label_column": [place for place, cell in enumerate(plain) if cell in _LABEL_COLUMNS],
    }
    found |= {argument: [first.index(name)] for argument, name in given.items() if name is not None}
    if not images and all(len(places) == 1 for places in found.values()):
        return (found["path_column"][0], found["label_column"][0]), True
    if len(first) == 2:  # a header with other words, or no header
        has_header = not images and _label(first[1].encode()) is None and _label(first[0].encode()) is None
        return ((1, 0) if images_below == [1] else (0, 1)), has_header
    if len(first) < 2:
        raise UnlabelledError(f'{file} has a single column, {_short(first[0])!r}; write a row "path,label" per image.')
    raise InputError(
        f"{file} has {len(first)} columns, {first[:8]}, and it is not clear which are the path and the label. Add a "
        "header and pass path_column= and label_column=, or keep two columns."
    )


def _delimiter(file: Path, line: str) -> str:
    if file.suffix.lower() == ".tsv":
        return "\t"
    return max(",;\t|", key=line.count)  # the comma if there is none


def _label(text: bytes) -> int | None:
    return int(text) if text.isdigit() and len(text) <= _MAX_DIGITS else None


def _check_columns(place: str, path: str, label: str, exists: Callable[[str], bool], endings: Set[str]) -> None:
    """Refuse a line with another column, unless the path that contains it exists."""
    words = path.split()
    ends = [Path(word).suffix.lower() in endings for word in (words[0], words[-1])]
    if ends == [True, False] and not exists(path):
        columns = [words[0], *words[1:], label]
        raise InputError(
            f"{place} has {len(columns)} columns, but a list has two, path and label. Keep {words[0]!r} and a single "
            f"label. {_EXAMPLE}"
        )
    if words[0].isdigit() and ends[1]:
        shorter = path.split(maxsplit=1)[1]
        if not exists(path) and exists(shorter):
            raise InputError(
                f"{place} starts with a number before the path {shorter!r}. Remove the first column. {_EXAMPLE}"
            )


def _bad_line(place: str, fields: list[str], first: bool) -> InputError:
    """Error for a line without an integer label, with advice that fits it."""
    label = fields[-1]
    if fields[0].startswith(("{", "[")):
        advice = f"The list looks like JSON. {_EXAMPLE}"
    elif len(fields) == 1:
        if "," in label or ";" in label:
            advice = "Columns separated by commas are read from files that end in .csv: rename the list."
        elif first and Path(label).suffix.lower() in image_endings():
            return UnlabelledError(f"{place} has no label. {_EXAMPLE}")
        else:
            advice = f"It has no label or no path. {_EXAMPLE}"
    elif label.startswith("-") and label[1:].isdigit():
        advice = "Labels are integers of at least 0; remove lines of images without a label."
    elif label.replace(".", "", 1).isdigit():
        advice = f"Write the label as an integer of at least 0 and at most 18 digits. {_EXAMPLE}"
    elif fields[0].isdigit():
        advice = f"The label comes first here; write the path first. {_EXAMPLE}"
    elif label.endswith(","):
        advice = "Columns separated by commas are read from files that end in .csv: rename the list."
    else:
        advice = f"The label must be an integer of at least 0, or one of class_names=. {_EXAMPLE}"
    return InputError(f'{place} is not "path label". {advice}')


def _not_empty(file: Path, table: ImageTable) -> ImageTable:
    if not len(table.paths):
        raise InputError(f'The image list {file} is empty; write a line "path label" for every image.')
    return table


def _refuse_utf16(file: Path, line: bytes) -> None:
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"The image list {file} is UTF-16 text; save it as UTF-8.")


class _reported:  # noqa: N801 - used as a context manager
    """Turns errors of reading a file into InputError."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, csv.Error)):
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"The image list {self._file} cannot be read: {reason}.") from error


def _unquoted(path: bytes) -> bytes:
    quoted = len(path) > 2 and path[:1] == path[-1:] and path[:1] in (b'"', b"'")
    return path[1:-1] if quoted else path


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _place(file: Path, number: int, fields: list[bytes]) -> str:
    line = b" ".join(fields)[-80:].decode("utf-8", "replace")
    return f"{file}, line {number}: {line!r}"


def _short(text: str) -> str:
    return text[:80]
