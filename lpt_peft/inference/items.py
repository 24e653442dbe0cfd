"""Images of any kind as a tensor: paths, encoded bytes, PIL images, arrays and tensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lpt_peft.data.files.reading import open_image, without_pillow_warnings
from lpt_peft.errors import InputError

_KINDS = (
    "a path, the bytes of an image file, a PIL image, a uint8 array (H, W, 3), or a tensor (3, H, W): uint8, or "
    "floating point and preprocessed by `transform`"
)


class Unreadable(NamedTuple):
    """Reason why an image cannot be read, in place of the image."""

    reason: str


Prepared = str | bytes | Image.Image | np.ndarray | Unreadable
"""A path, the bytes of a file, an RGB image, an array (H, W, C) uint8, or preprocessed pixels (3, h, w) float32."""


def single_images(images: Any) -> Iterable[Any]:
    """Return an iterable of single images, unchanged if `images` is such an iterable.

    Args:
        images: A single image, or an iterable of images; an array (N, H, W, C) or a tensor (N, C, H, W) is a batch.

    Raises:
        InputError: It is neither, or is a file or a table, whose iteration yields lines or names of columns.
    """
    is_array = isinstance(images, (np.ndarray, Tensor))
    if isinstance(images, (str, os.PathLike, bytes, Image.Image)) or (is_array and images.ndim in (2, 3)):
        return [images]
    if hasattr(images, "read"):
        raise InputError(f"images is a {type(images).__name__}, an open file: give its content, images.read().")
    no_sequence = images.ndim == 0 if is_array else getattr(images, "ndim", 1) != 1  # a number or a table
    if no_sequence or isinstance(images, (Mapping, bytearray, memoryview)) or not isinstance(images, Iterable):
        raise InputError(f"images is a {type(images).__name__}: give {_KINDS}; or several of these, such as a list.")
    return images


class ItemPreparer:
    """Checks images before they are read, names them, and makes them ready for worker processes.

    A worker receives a pickled image. A PIL image would lose its format and its TIFF tags, one that cannot be decoded
    or a tensor with a gradient cannot be pickled at all, and each tensor would keep a file descriptor open.

    Args:
        size: (height, width) of preprocessed images.
        reading: From a PIL image of any mode to RGB.
        warn: Warn once of a floating point tensor from 0 to 1, which is probably not preprocessed.
    """

    def __init__(self, size: tuple[int, int], reading: Callable[[Image.Image], Image.Image], warn: bool) -> None:
        self._size = size
        self._reading = reading
        self._warn = warn

    def __call__(self, item: Any, position: int) -> tuple[str, Prepared]:
        """Return the name of an image, which is its path, or "image" and its position; and the prepared image.

        Raises:
            InputError: It has another type or shape.
        """
        if isinstance(item, (str, os.PathLike)) and not isinstance(path := os.fspath(item), bytes):
            return str(path), str(path)
        name = f"image {position}"
        if isinstance(item, bytes):
            return name, item
        if isinstance(item, Image.Image):
            return name, self._converted(item)
        problem = f"is a {type(item).__name__}"
        if isinstance(item, (tuple, list)):
            problem += "; of a data set of pairs, give the images alone: (image for image, label in data)"
        elif isinstance(item, np.ndarray):
            problem = _array_problem(item)
        elif isinstance(item, Tensor):
            problem = self._tensor_problem(item)
        if problem:
            raise InputError(f"{name} {problem}. Give {_KINDS}.")
        return name, self._pixels(item) if isinstance(item, Tensor) else item

    def _converted(self, image: Image.Image) -> Prepared:
        try:
            with without_pillow_warnings():
                image.load()
                return self._reading(image)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise all kinds of exceptions on broken bytes
            return Unreadable(_reason(image, error))

    def _pixels(self, tensor: Tensor) -> Prepared:
        if not tensor.is_floating_point():
            return tensor.permute(1, 2, 0).cpu().numpy()
        tensor = tensor.detach().to("cpu", torch.float32)
        if not bool(tensor.isfinite().all()):
            return Unreadable("the tensor has values that are NaN or infinite")
        if self._warn and tensor.min() >= 0 and 0 < tensor.max() <= 1:
            self._warn = False
            warnings.warn(
                "Tensors of floating point are taken as preprocessed, with mean and std of the backbone, but the "
                "values of this tensor are from 0 to 1. Unless it is preprocessed, its prediction is wrong: give a "
                "uint8 tensor, or apply `transform` of the classifier.",
                UserWarning,
                stacklevel=2,
            )
        return tensor.numpy()

    def _tensor_problem(self, item: Tensor) -> str:
        shape, dtype = tuple(item.shape), str(item.dtype).removeprefix("torch.")
        found = f"is a tensor {shape} of dtype {dtype}"
        expected = (3, *self._size)
        if item.is_floating_point():
            return "" if shape == expected else f"{found}, and preprocessed images have the shape {expected}"
        if item.dtype is not torch.uint8 or item.ndim != 3 or shape[0] not in (1, 3, 4):
            last = item.dtype is torch.uint8 and item.ndim == 3 and shape[2] in (1, 3, 4)
            return f"{found}; its channels must be first: tensor.permute(2, 0, 1)" if last else found
        return ""


def _array_problem(item: np.ndarray) -> str:
    shape = item.shape
    if item.dtype == np.uint8 and (item.ndim == 2 or (item.ndim == 3 and shape[2] in (1, 3, 4))):
        return ""
    hint = ""
    if item.ndim == 3 and shape[0] in (1, 3, 4) and item.dtype == np.uint8:
        hint = "; its channels must be last: array.transpose(1, 2, 0)"
    elif item.dtype != np.uint8:
        hint = "; convert its values to 0 to 255: (255 * array).round().astype(numpy.uint8)"
    return f"is an array {shape} of dtype {item.dtype}{hint}"


class ItemReader(Dataset[Any]):
    """Reads prepared images by themselves instead of an index: the tensor (3, h, w), or None, and the reason.

    A `DataLoader` sends what its batch sampler yields to the worker processes. With images in place of indices, an
    iterable of any length is read in order, with a few batches in memory.

    Args:
        transform: From a PIL image to a tensor (3, h, w).
    """

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self._transform = transform

    def __getitem__(self, item: Prepared) -> tuple[Tensor | None, str | None]:
        if isinstance(item, Unreadable):
            return None, item.reason
        if isinstance(item, np.ndarray) and item.dtype == np.float32:
            return torch.from_numpy(item), None
        try:
            with without_pillow_warnings():
                return self._transform(_open(item)), None
        except MemoryError:
            raise
        except Exception as error:  # decoders raise all kinds of exceptions on broken bytes
            return None, _reason(item, error)


def collate_read(read: Sequence[tuple[Tensor | None, str | None]]) -> tuple[Tensor | None, list[str | None]]:
    """Stack the images that were read, (B, 3, h, w), or None; and for each item, the error or None."""
    tensors = [tensor for tensor, _ in read if tensor is not None]
    return (torch.stack(tensors) if tensors else None), [error for _, error in read]


def _open(item: str | bytes | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(item[..., 0] if item.ndim == 3 and item.shape[2] == 1 else item))
    return open_image(item)


def _reason(item: Any, error: Exception) -> str:
    """Reason why an image cannot be read, with the name of the exception only if it has no text."""
    if isinstance(item, (str, os.PathLike)) and os.path.isdir(item):  # noqa: PTH112
        return "a folder; lpt_peft.inference.image_paths lists its images"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)[:200]
    return text.rstrip().rstrip(".") or type(error).__name__
