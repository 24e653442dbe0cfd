"""Helpers that write small images for the tests."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def color(index: int, label: int = 0) -> tuple[int, int, int]:
    """A colour that encodes index and label."""
    return (index % 256, 10 * label % 256, 99)


def write_png(path: Path, index: int, label: int = 0, size: tuple[int, int] = (6, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color(index, label)).save(path)


def seen(image: Image.Image) -> tuple[int, int, int]:
    """The colour of an image written by `write_png`."""
    assert image.mode == "RGB"
    return image.getpixel((0, 0))
