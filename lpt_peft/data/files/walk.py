"""Walk through class folders: every image once, and the reason for every entry that is left out.

Hidden and system entries are never images or classes. A link is followed if its target is not counted elsewhere in
the walk, so links that lead back into the tree, and several links to the same target, add nothing.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable

import numpy as np

from lpt_peft.data.files.formats import image_endings, reason_of_ending
from lpt_peft.data.files.path_list import PathList

HIDDEN = "hidden or system entry"
OUTSIDE = "outside the class folders"
BROKEN = "broken link"
REPEATED = "link to files that are counted elsewhere"
NOT_REGULAR = "not a regular file"
CLOSED = "folder that cannot be opened"
IGNORED = "excluded by ignore"

_SYSTEM = frozenset(
    {
        "__macosx",
        "@eadir",
        "#recycle",
        "#snapshot",
        "@recycle",
        "@recently-snapshot",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        "icon\r",
        "__pycache__",
        "network trash folder",
        "temporary items",
    }
)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or is created by an operating system, a file server or an editor.

    Example:
        >>> [is_hidden(name) for name in ("._1.png", "Thumbs.db", "__MACOSX", "cat", "1.png")]
        [True, True, True, False, False]
    """
    return name.startswith((".", "~$")) or name.lower() in _SYSTEM


class ClassFolders:
    """Images below the class folders of a root folder, found once when the object is created.

    Args:
        root: Folder of class folders.
        ignore: Files and folders to leave out, absolute or relative to `root`.

    Attributes:
        class_names: Names of the class folders, sorted, including those without an image.
        paths: Images relative to `root`: class after class, and in a class by folder, then by name.
        labels: (N,) int64, position of the class in `class_names`.
        left_out: For each reason, the entries that are not images, relative to `root`.
    """

    def __init__(self, root: str | os.PathLike[str], ignore: Iterable[str | os.PathLike[str]] = ()) -> None:
        self._root = os.path.join(os.fspath(root), "")  # noqa: PTH118 - a Path drops the final separator
        self._real_root = os.path.realpath(root)
        self._ignored = {os.path.realpath(os.path.join(self._root, path)) for path in ignore}  # noqa: PTH118
        self._endings = image_endings()
        self._entered: set[str] = set()
        self._images: dict[str, dict[str, list[str]]] = {}
        self._folder_links: list[tuple[str, str]] = []
        self._file_links: list[tuple[str, str, str]] = []
        self.left_out: dict[str, PathList] = {}
        self._scan_root()
        self._follow_folder_links()
        self._follow_file_links()
        self.class_names = sorted(self._images)
        self.paths, labels = PathList(), array("q")
        for label, name in enumerate(self.class_names):
            for folder, files in sorted(self._images[name].items()):
                for file in sorted(files):
                    self.paths.append(folder[len(self._root) :] + os.sep + file)
                    labels.append(label)
        self.labels = np.array(labels, dtype=np.int64)
        del self._images, self._entered

    def _scan_root(self) -> None:
        for entry, is_link in self._entries(self._root, self._real_root):
            path = self._root + entry.name
            if is_link and not os.path.exists(path):  # noqa: PTH110 - a Path for each of 500,000 files is slow
                self._leave_out(BROKEN, path)
            elif not os.path.isdir(path):  # noqa: PTH112
                self._leave_out(OUTSIDE, path)
            elif is_link:
                self._folder_links.append((entry.name, path))
            else:
                self._enter(entry.name, path, self._real_root + os.sep + entry.name)

    def _enter(self, class_name: str, path: str, real: str) -> None:
        """Collect the images of a folder at any depth; links are noted and followed after all folders."""
        pending = [(path, real)]
        while pending:
            folder, real = pending.pop()
            if real in self._entered:
                self._leave_out(REPEATED, folder + os.sep)
                continue
            self._entered.add(real)
            files = self._images.setdefault(class_name, {}).setdefault(folder, [])
            for entry, is_link in self._entries(folder, real, files):
                below = folder + os.sep + entry.name
                if is_link and os.path.isdir(below):  # noqa: PTH112 - entry.is_dir() fails on a link to itself
                    self._folder_links.append((class_name, below))
                elif is_link:
                    self._file_links.append((class_name, folder, entry.name))
                elif entry.is_dir():
                    pending.append((below, real + os.sep + entry.name))
                elif self._is_image(entry.name, below, entry.is_file()):
                    files.append(entry.name)

    def _entries(self, folder: str, real: str, images: list[str] | None = None) -> list[tuple[os.DirEntry[str], bool]]:
        """Entries that are not hidden or ignored, sorted by name, and whether they are links.

        With `images`, the names of ordinary image files are added there instead: the fast path of large folders.
        """
        try:
            with os.scandir(folder) as entries:
                if images is None or self._ignored:
                    others = list(entries)
                else:
                    others = [entry for entry in entries if not self._is_ordinary_image(entry, images)]
        except OSError:
            self._leave_out(CLOSED, folder)
            return []
        kept = []
        for entry in sorted(others, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                self._leave_out(HIDDEN, entry.path)
            elif self._ignored and os.path.join(real, entry.name) in self._ignored:  # noqa: PTH118
                self._leave_out(IGNORED, entry.path)
            else:
                is_junction = getattr(entry, "is_junction", bool)()  # Windows, Python 3.12
                kept.append((entry, entry.is_symlink() or is_junction))
        return kept

    def _is_ordinary_image(self, entry: os.DirEntry[str], images: list[str]) -> bool:
        name = entry.name
        ending = name[name.rfind(".") :].lower()
        if ending in self._endings and name[0] not in ".~" and entry.is_file(follow_symlinks=False):
            images.append(name)
            return True
        return False

    def _is_image(self, name: str, path: str, is_file: bool) -> bool:
        if os.path.splitext(name)[1].lower() not in self._endings:  # noqa: PTH122
            self._leave_out(reason_of_ending(name), path)
        elif not is_file:
            self._leave_out(NOT_REGULAR, path)
        else:
            return True
        return False

    def _follow_folder_links(self) -> None:
        while self._folder_links:
            self._folder_links.sort(key=lambda link: link[1])
            class_name, path = self._folder_links.pop(0)
            real = os.path.realpath(path)
            if self._is_ignored(real):
                self._leave_out(IGNORED, path)
            elif real in self._entered or (self._real_root + os.sep).startswith(os.path.join(real, "")):  # noqa: PTH118
                self._leave_out(REPEATED, path)
            else:
                self._enter(class_name, path, real)

    def _follow_file_links(self) -> None:
        followed: set[str] = set()
        for class_name, folder, name in sorted(self._file_links):
            path = folder + os.sep + name
            real = os.path.realpath(path)
            if not os.path.exists(real):  # noqa: PTH110
                self._leave_out(BROKEN, path)
            elif self._is_ignored(real):
                self._leave_out(IGNORED, path)
            elif self._is_image(name, path, os.path.isfile(real)):  # noqa: PTH113
                if real in followed or self._is_counted(real):
                    self._leave_out(REPEATED, path)
                else:
                    followed.add(real)
                    self._images[class_name][folder].append(name)

    def _is_counted(self, real: str) -> bool:
        folder, name = os.path.split(real)
        readable = os.path.splitext(name)[1].lower() in self._endings  # noqa: PTH122
        return readable and not is_hidden(name) and folder in self._entered

    def _is_ignored(self, real: str) -> bool:
        return any(real == path or real.startswith(path + os.sep) for path in self._ignored)

    def _leave_out(self, reason: str, path: str) -> None:
        name = path[len(self._root) :] or "."
        self.left_out.setdefault(reason, PathList()).append(name)
