"""Image files of paths, folders and patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator

from lpt_peft.data.files.formats import image_endings
from lpt_peft.data.files.walk import is_hidden
from lpt_peft.errors import InputError

Place = str | os.PathLike[str]


def image_paths(places: Place | Iterable[Place]) -> Iterator[str]:
    """Iterate over the image files of paths, folders and patterns.

    Paths of files are returned as they are, also of files that do not exist. Of a folder, the files with the ending of
    an image format at any depth are returned, in the order of their names; hidden and system entries are left out, and
    so are pipes and devices, whose reading might never end. Links are followed after other entries, but no folder is
    entered twice. Of a pattern such as `photos/**/*.jpg`, all files that it matches are returned. A path that exists is
    never a pattern. The folders are read while the result is iterated.

    Args:
        places: Files, folders or patterns; `~` is not expanded.

    Raises:
        InputError: A folder has no image, or a pattern matches nothing.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("b.jpg", "a.png", "notes.txt"):
        ...         Path(folder, name).touch()
        ...     [Path(path).name for path in image_paths(folder)]
        ['a.png', 'b.jpg']
    """
    for place in [places] if isinstance(places, (str, os.PathLike)) else places:
        path = os.fspath(place)
        if os.path.isdir(path):  # noqa: PTH112 - the path is returned as given, which Path would normalize
            yield from _at_least_one(_files_below(path, set()), f"The folder {path} has no image")
        elif glob.has_magic(path) and not os.path.lexists(path):
            yield from _at_least_one(_matches(path), f"No file matches {path}")
        else:
            yield path


def _at_least_one(paths: Iterator[str], problem: str) -> Iterator[str]:
    found = False
    for path in paths:
        found = True
        yield path
    if not found:
        raise InputError(f"{problem}: check the path.")


def _matches(pattern: str) -> Iterator[str]:
    """Files that a pattern matches, and the images in folders that it matches, sorted."""
    entered: set[str] = set()
    for path in sorted(glob.iglob(pattern, recursive=True)):  # noqa: PTH207 - paths as given
        if os.path.isdir(path):  # noqa: PTH112
            if "**" not in pattern:  # which matches the files of the folder itself
                yield from _files_below(path, entered)
        else:
            yield path


def _files_below(folder: str, entered: set[str]) -> Iterator[str]:
    """Image files of a folder, then of its subfolders; folders whose real path is in `entered` are left out."""
    real = os.path.realpath(folder)
    if real in entered:
        return
    entered.add(real)
    endings = image_endings()
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be read: {error.strerror}. Change its permissions.") from error
    folders = []
    for entry in found:
        if os.path.isdir(entry.path):  # noqa: PTH112 - entry.is_dir() fails on a link to itself
            folders.append(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in endings and not _is_special(entry.path):  # noqa: PTH122
            yield entry.path
    for path in sorted(folders, key=os.path.islink):  # the sort keeps the order of the names
        yield from _files_below(path, entered)


def _is_special(path: str) -> bool:
    """Whether a path is neither a file nor a broken link."""
    return os.path.exists(path) and not os.path.isfile(path)  # noqa: PTH110, PTH113
