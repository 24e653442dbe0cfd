"""Images of any kind as a tensor: paths, encoded bytes, PIL images, arrays and tensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

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


def iterate_items(images: Any) -> Iterator[Any]:
    """Iterate over single images.

    Args:
        images: A single image, or an iterable of images; an array (N, H, W, C) or a tensor (N, C, H, W) is a batch.

    Raises:
        InputError: It is neither.
    """
    if isinstance(images, (str, os.PathLike, bytes, Image.Image)):
        return iter([images])
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim in (2, 3):
        return iter([images])
    if isinstance(images, Mapping) or not isinstance(images, Iterable) or getattr(images, "ndim", 1) == 0:
        raise InputError(f"images is a {type(images).__name__}: give {_KINDS}; or several of these, such as a list.")
    return iter(images)


class ItemChecker:
    """Checks the type and the shape of images before they are read, and names them.

    Args:
        size: (height, width) of preprocessed images.
        warn: Warn once of a floating point tensor from 0 to 1, which is probably not preprocessed.
    """

    def __init__(self, size: tuple[int, int], warn: bool) -> None:
        self._size = size
        self._warn = warn

    def name(self, item: Any, position: int) -> str:
        """Check an image and return its name: the path, or "image" and its position.

        Raises:
            InputError: It has another type or shape.
        """
        if isinstance(item, (str, os.PathLike)) and not isinstance(path := os.fspath(item), bytes):
            return path
        problem = None
        if isinstance(item, np.ndarray):
            problem = _array_problem(item)
        elif isinstance(item, Tensor):
            problem = self._tensor_problem(item)
        elif not isinstance(item, (bytes, Image.Image)):
            problem = f"is a {type(item).__name__}"
            if isinstance(item, Sequence):
                problem += "; of a data set of pairs, give the images alone: (image for image, label in data)"
        if problem:
            raise InputError(f"image {position} {problem}. Give {_KINDS}.")
        return f"image {position}"

    def _tensor_problem(self, item: Tensor) -> str | None:
        shape, dtype = tuple(item.shape), str(item.dtype).removeprefix("torch.")
        if not item.is_floating_point():
            fits = item.dtype is torch.uint8 and item.ndim == 3 and shape[0] in (1, 3, 4)
            return None if fits else f"is a tensor {shape} of dtype {dtype}"
        expected = (3, *self._size)
        if shape != expected:
            return f"is a tensor {shape} of dtype {dtype}, and preprocessed images have the shape {expected}"
        if self._warn and item.numel() and item.min() >= 0 and 0 < item.max() <= 1:
            self._warn = False
            warnings.warn(
                "Tensors of floating point are taken as preprocessed, with mean and std of the backbone, but the "
                "values of this tensor are from 0 to 1. Unless it is preprocessed, its prediction is wrong: give a "
                "uint8 tensor, or apply `transform` of the classifier.",
                UserWarning,
                stacklevel=2,
            )
        return None


def _array_problem(item: np.ndarray) -> str | None:
    shape = item.shape
    if item.dtype == np.uint8 and (item.ndim == 2 or (item.ndim == 3 and shape[2] in (1, 3, 4))):
        return None
    hint = ""
    if item.ndim == 3 and shape[0] in (1, 3, 4) and item.dtype == np.uint8:
        hint = "; its channels must be last: array.transpose(1, 2, 0)"
    elif item.dtype != np.uint8:
        hint = "; convert its values to 0 to 255: (255 * array).round().astype(numpy.uint8)"
    return f"is an array {shape} of dtype {item.dtype}{hint}"


class ItemReader(Dataset[Any]):
    """Reads images by themselves instead of an index: `reader[path]` is the tensor (3, h, w), or None, and the reason.

    A `DataLoader` sends what its batch sampler yields to the worker processes. With images in place of indices, an
    iterable of any length is read in order, with a few batches in memory.

    Args:
        transform: From a PIL image to a tensor (3, h, w).
    """

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self._transform = transform

    def __getitem__(self, item: Any) -> tuple[Tensor | None, str | None]:
        if isinstance(item, Tensor) and item.is_floating_point():
            return item.detach().to("cpu", torch.float32), None
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


def _open(item: Any) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, Tensor):
        item = item.permute(1, 2, 0).cpu().numpy()
    if isinstance(item, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(item[..., 0] if item.ndim == 3 and item.shape[2] == 1 else item))
    return open_image(item)


def _reason(item: Any, error: Exception) -> str:
    """Reason why an image cannot be read, with the name of the exception only if it has no text."""
    if isinstance(item, (str, os.PathLike)) and os.path.isdir(item):  # noqa: PTH112
        return "a folder; lpt_peft.inference.image_paths lists its images"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)[:200]
    return text.rstrip().rstrip(".") or type(error).__name__
