"""Image formats that Pillow can read, and file endings.

Left out although Pillow registers them: PDF, which Pillow can only write; EPS, PS, WMF and EMF, drawings that an
external program or Windows has to render; MPEG and FLI, which are videos; BUFR, GRIB and HDF5, which have no decoder.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import PurePath

from PIL import Image

NOT_IMAGES = frozenset({"PDF", "EPS", "WMF", "MPEG", "FLI", "BUFR", "GRIB", "HDF5"})
_PREFERRED = ("JPEG", "PNG", "WEBP")
_PLUGINS = {
    "HEIC photo; pip install pillow-heif": (".heic", ".heif", ".hif"),
    "JPEG XL image; needs a Pillow plugin": (".jxl",),
    "raw photo of a camera; convert it": (".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"),
    "drawing; convert it": (".svg", ".svgz", ".pdf", ".eps", ".ps", ".ai", ".wmf", ".emf"),
    "video": (".mp4", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v", ".fli", ".flc"),
}
NO_ENDING, OTHER_ENDING = "no file ending", "not an image ending"
_REASONS = {ending: reason for reason, endings in _PLUGINS.items() for ending in endings}


@cache
def _register_plugins() -> None:
    """Register pillow-heif if it is installed; worker processes call this as well."""
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()


def readable_formats() -> list[str]:
    """Names of the image formats that Pillow can open, including those of registered plugins.

    Example:
        >>> formats = readable_formats()
        >>> "JPEG" in formats, "AVIF" in formats or "no libavif", "EPS" in formats
        (True, True, False)
    """
    _register_plugins()
    Image.init()
    found = [name for name in Image.ID if name not in NOT_IMAGES and name not in _PREFERRED]
    return [*(name for name in _PREFERRED if name in Image.OPEN), *found]


def image_endings() -> frozenset[str]:
    """File endings of readable images, lower case with the dot.

    Example:
        >>> endings = image_endings()
        >>> [ending in endings for ending in (".jpg", ".jfif", ".gif", ".mpo", ".pdf", ".txt")]
        [True, True, True, True, False, False]
    """
    # The opener of JPEG reads MPO files too.
    readable = {*readable_formats(), "MPO"}
    return frozenset(ending.lower() for ending, name in Image.registered_extensions().items() if name in readable)


def reason_of_ending(name: str) -> str:
    """Reason why a file is not read as an image, from its ending.

    Example:
        >>> reason_of_ending("a/IMG_1.HEIC"), reason_of_ending("notes.txt"), reason_of_ending("README")
        ('HEIC photo; pip install pillow-heif', 'not an image ending (.txt)', 'no file ending')
    """
    ending = PurePath(name).suffix.lower()
    if not ending:
        return NO_ENDING
    described = ending if len(ending) < 12 and ending.isprintable() else "unusual"
    return _REASONS.get(ending, f"{OTHER_ENDING} ({described})")
