"""Reading of images as 8-bit RGB: EXIF orientation, transparency, and every mode of Pillow.

Training, evaluation and prediction read images through `Reading`, so that they see the same pixels. Colour profiles are
not applied, and of an animation the first frame is read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from lpt_peft.data.files.formats import readable_formats
from lpt_peft.errors import ConfigError, InputError

Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)

ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 0x0112, 258, 262
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIGNATURES = (
    (b"version https://git-lfs", "it is a Git LFS pointer; run `git lfs pull`"),
    (b"<!doctype html", "it is an HTML page, probably of a failed download"),
    (b"<html", "it is an HTML page, probably of a failed download"),
)


@dataclass(frozen=True)
class Reading:
    """Settings of reading an image; part of the preprocessing that a prompt file stores.

    Args:
        exif: Follow the EXIF orientation. TIFF files are always rotated, because Pillow does so when it loads them.
        background: RGB colour, 0 to 255, behind transparent pixels.

    Raises:
        ConfigError: A setting has another type or is out of range.

    Example:
        >>> half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
        >>> Reading()(half).getpixel((0, 0)), Reading(background=(0, 0, 0))(half).getpixel((0, 0))
        ((127, 127, 127), (0, 0, 0))
    """

    exif: bool = True
    background: Color = WHITE

    def __post_init__(self) -> None:
        if not isinstance(self.exif, bool):
            raise ConfigError(f"exif={self.exif!r} must be True or False.")
        values = tuple(self.background) if isinstance(self.background, (list, tuple)) else ()
        if len(values) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in values):
            raise ConfigError(
                f"background={self.background!r} must be three integers from 0 to 255, red, green and blue, such as "
                "(255, 255, 255)."
            )
        object.__setattr__(self, "background", values)

    @classmethod
    def from_preprocess(cls, preprocess: Mapping[str, Any]) -> Reading:
        """Build the settings from `exif` and `background` of a preprocessing configuration, if it has them."""
        return cls(**{key: preprocess[key] for key in ("exif", "background") if preprocess.get(key) is not None})

    def to_preprocess(self) -> dict[str, Any]:
        """Return `exif` and `background` as plain JSON."""
        return {"exif": self.exif, "background": list(self.background)}

    def __call__(self, image: Any) -> Any:
        """Convert a PIL image to RGB; other objects, such as tensors, are returned unchanged.

        Raises:
            InputError: The image is grey with 32 bits or floating point, whose white value is not defined.
        """
        if not isinstance(image, Image.Image):
            return image
        orientation = orientation_of(image) if self.exif else 1
        converted = _to_rgb(image, self.background)
        if orientation in _TRANSPOSE:
            converted = converted.transpose(_TRANSPOSE[orientation])
            converted.info = {}  # without the tag, so that a second call does not rotate again
        return converted


def open_image(file: str | os.PathLike[str] | bytes | BinaryIO) -> Image.Image:
    """Open and decode an image in its own mode; `Reading` converts it to RGB.

    Args:
        file: Path, content of a file, or a binary stream.

    Raises:
        OSError: The file is missing, not an image or truncated. Broken files also raise other exceptions of decoders.
    """
    if isinstance(file, (str, os.PathLike)):
        with Path(file).open("rb") as opened:
            return open_image(opened)
    image = identify(BytesIO(file) if isinstance(file, bytes) else file)
    image.load()
    return image


def identify(stream: BinaryIO) -> Image.Image:
    """Read the header of an image; `load()` of the result decodes the pixels.

    Raises:
        OSError: The content is not an image.
    """
    try:
        image = Image.open(stream, formats=readable_formats())
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(f"not an image: {_explain(stream)}") from error
    _scale_transparent_color(image)
    return image


@contextmanager
def without_pillow_warnings() -> Iterator[None]:
    """Silence Pillow's warnings about single files, which would be repeated in every epoch; check_images lists them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def read_image(file: str | os.PathLike[str] | bytes | BinaryIO, reading: Reading | None = None) -> Image.Image:
    """Read an image as RGB.

    Args:
        file: Path, content of a file, or a binary stream.
        reading: Orientation and background; None uses the defaults.

    Raises:
        OSError: As `open_image`.
        InputError: As `Reading`.
    """
    with without_pillow_warnings():
        image: Image.Image = (reading or Reading())(open_image(file))
    return image


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where it is missing or the EXIF data are broken."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken EXIF data of a readable image raise all kinds of exceptions
        return 1


def has_transparency(image: Image.Image) -> bool:
    """Whether an image has an alpha channel, a transparent colour or a palette with alpha."""
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def is_deep_grey(image: Image.Image) -> bool:
    """Whether an image is grey with more than 8 bits and a known white value."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _scale_transparent_color(image: Image.Image) -> None:
    """Scale the transparent colour of a PNG image to 8 bits like its pixels, which Pillow omits; before `load`."""
    color, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    if image.format != "PNG" or color is None or not tiles:
        return
    raw_mode = tiles[0][3]
    step = {"1": 255, "L;2": 85, "L;4": 17}.get(raw_mode, 1)
    if isinstance(color, int) and color * step <= 255:
        image.info["transparency"] = color * step
    elif isinstance(color, tuple) and raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _to_rgb(image: Image.Image, background: Color) -> Image.Image:
    if is_deep_grey(image):
        return _deep_grey_to_rgb(image, background)
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        kind = "32-bit integer" if image.mode == "I" else "32-bit floating-point"
        raise InputError(
            f"{kind} grey (mode {image.mode}, values from {low} to {high}) has no defined white value. Scale the "
            "image to 8 or 16 bits"
        )
    if has_transparency(image):
        if image.mode == "La":
            image = image.convert("LA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image, background: Color) -> Image.Image:
    """Keep the upper 8 bits, as Pillow does for 16-bit colour."""
    tags = getattr(image, "tag_v2", {})  # of TIFF
    bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0]) if tags else 16
    values = np.asarray(image).astype(np.int64)
    grey = np.clip(values >> max(bits - 8, 0), 0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow inverts this for 8 bits only
        grey = 255 - grey
    pixels = np.repeat(grey[..., None], 3, axis=2)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        pixels[values == transparent] = background
    return Image.fromarray(pixels)


def _explain(stream: BinaryIO) -> str:
    """Describe the content of a file that no decoder accepts."""
    stream.seek(0)
    head = stream.read(64)
    if not head:
        return "the file is empty"
    if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
        return "it is a HEIC photo; pip install pillow-heif"
    found = [text for signature, text in _SIGNATURES if head.lower().startswith(signature)]
    return found[0] if found else f"no format is known that starts with {head[:8]!r}"
