"""check_images: open every image of a data set without training, and list what is unusual."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from lpt_peft.data.files.reading import ORIENTATION, has_transparency, identify, is_deep_grey, orientation_of
from lpt_peft.data.images import LabelledImages
from lpt_peft.data.inspection.report import KINDS, CheckReport, Finding
from lpt_peft.errors import InputError

_CHUNK, _TINY = 32, 16
_ORDINARY_MODES = ("RGB", "L", "P", "I", "F")  # I and F are refused, or deep
_Notes = list[tuple[str, str]]
_Facts = tuple[int, _Notes, bytes | None]


def check_images(
    data: LabelledImages | Mapping[str, LabelledImages],
    *,
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> CheckReport:
    """Open every image once and report what is unreadable, unusual or repeated.

    Nothing is changed, and no transform is applied. Images are repeated if they have the same pixels after the
    conversion to RGB. Reading takes about as long as an epoch of training reads.

    Args:
        data: A data set, or several splits by name, which are compared with each other.
        workers: Threads; None uses all cores for files, and a single thread for other sources, which may not allow
            several.
        progress: Called with the number of images done and their total.

    Returns:
        Summaries and findings; see `lpt_peft.data.inspection.report.KINDS`.

    Example:
        >>> from lpt_peft.data.sources import ArrayImages
        >>> pixels = np.zeros((2, 32, 32, 3), dtype=np.uint8)
        >>> report = check_images(LabelledImages(ArrayImages(pixels, "zeros"), [0, 1]))
        >>> report.counts, report.readable
        ({'duplicate in several classes': 1, 'blank': 2}, True)
    """
    splits = {"": data} if isinstance(data, LabelledImages) else dict(data)
    total, done = sum(len(split) for split in splits.values()), 0
    findings: list[Finding] = []
    repeated: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow on single files, which are findings here
        for name, split in splits.items():
            for position, notes, digest in _facts(split, workers):
                file = _file(name, split, position)
                findings += [Finding(kind, (file,), detail) for kind, detail in notes]
                if digest is not None:
                    repeated[digest].append((name, position))
                done += 1
                if progress is not None:
                    progress(done, total)
    findings += [_duplicate(splits, places) for places in repeated.values() if len(places) > 1]
    order = {kind: rank for rank, kind in enumerate(KINDS)}
    findings.sort(key=lambda finding: order[finding.kind])
    return CheckReport({name: split.summary for name, split in splits.items()}, findings)


def _file(split_name: str, split: LabelledImages, position: int) -> str:
    name = split.images.name(position)
    return f"{split_name}: {name}" if split_name else name


def _duplicate(splits: Mapping[str, LabelledImages], places: list[tuple[str, int]]) -> Finding:
    classes = [splits[name].class_names[splits[name].labels[position]] for name, position in places]
    kind = "duplicate"
    if len({name for name, _ in places}) > 1:
        kind = "duplicate in several splits"
    elif len(set(classes)) > 1:
        kind = "duplicate in several classes"
    detail = f"classes {', '.join(sorted(set(classes)))}" if len(set(classes)) > 1 else ""
    return Finding(kind, tuple(_file(name, splits[name], position) for name, position in places), detail)


def _facts(data: LabelledImages, workers: int | None) -> Iterator[_Facts]:
    """Position, findings and digest of every image, in order."""
    if workers is None:
        workers = (os.cpu_count() or 1) if len(data) and data.images.path(0) is not None else 1
    chunks = [range(start, min(start + _CHUNK, len(data))) for start in range(0, len(data), _CHUNK)]
    executor = ThreadPoolExecutor(max(workers, 1))
    try:
        for facts in executor.map(lambda chunk: [_inspect(data, position) for position in chunk], chunks):
            yield from facts
    finally:
        executor.shutdown(cancel_futures=True)


def _inspect(data: LabelledImages, position: int) -> _Facts:
    notes: _Notes = []
    try:
        path = data.images.path(position)
        if path is None:
            image = data.images.read(position)
            _describe(image, notes)
            if isinstance(image, Image.Image):
                _describe_orientation(orientation_of(image), notes)
            digest = _digest(data, image, notes)
        else:
            with Path(path).open("rb") as stream:
                image = identify(stream)
                _describe(image, notes)
                rotation = getattr(image, "tag_v2", {}).get(ORIENTATION, 1)  # loading a TIFF file removes the tag
                image.load()
                _describe_orientation(rotation if rotation != 1 else orientation_of(image), notes)
                digest = _digest(data, image, notes)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise all kinds of exceptions on broken bytes
        return position, [*notes, (_kind(error), f"{type(error).__name__}: {str(error)[:200]}")], None
    return position, notes, digest


def _kind(error: Exception) -> str:
    """Kind of finding of an exception that a decoder raised."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return "missing"
    if isinstance(error, Image.DecompressionBombError):
        return "too large"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, InputError):
        return "unsupported mode"
    return "truncated" if "truncated" in str(error).lower() else "corrupt"


def _describe(image: Any, notes: _Notes) -> None:
    """Add findings from the header of an image, before its pixels are decoded."""
    if not isinstance(image, Image.Image):
        return
    if has_transparency(image):
        notes.append(("transparent", f"mode {image.mode}"))
    elif image.mode not in _ORDINARY_MODES and not is_deep_grey(image):
        notes.append(("mode", f"mode {image.mode}"))
    tiles = getattr(image, "tile", None)
    if image.mode in ("RGB", "RGBA", "LA") and tiles and ";16" in str(tiles[0][3]):
        notes.append(("deep", "16-bit colour"))
    frames = 1
    with suppress(Exception):  # a broken later frame does not matter
        frames = int(getattr(image, "n_frames", 1))
        image.seek(0)
    if frames > 1:
        notes.append(("animated", f"{frames} frames"))
    if min(image.size) < _TINY:
        notes.append(("tiny", f"{image.width} x {image.height} pixels"))
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        notes.append(("enormous", f"{image.width} x {image.height} pixels"))


def _describe_orientation(orientation: int, notes: _Notes) -> None:
    if 2 <= orientation <= 8:
        notes.append(("rotated", f"EXIF orientation {orientation}"))


def _digest(data: LabelledImages, image: Any, notes: _Notes) -> bytes:
    """Digest of the pixels as the training sees them; adds findings about their values."""
    if isinstance(image, Image.Image) and is_deep_grey(image):
        low, high = image.getextrema()
        notes.append(("deep", f"grey, mode {image.mode}, values from {low} to {high}"))
    pixels = data.reading(image)
    if isinstance(pixels, Image.Image):
        shape, content = pixels.size, pixels.tobytes()
        blank = bool((np.ptp(np.reshape(pixels.getextrema(), (-1, 2)), axis=1) == 0).all())
    else:
        array = np.asarray(pixels)
        shape, content = array.shape, array.tobytes()
        blank = bool(array.size) and bool((array == array.ravel()[0]).all())
    if blank:
        notes.append(("blank", ""))
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    digest.update(content)
    return digest.digest()
