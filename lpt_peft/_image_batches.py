"""Batches of images from a tensor or a loader, and rows of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lpt_peft.errors import InputError


def image_batches(images: Any, batch_size: int) -> Iterable[Any]:
    """Split images (N, ...) into batches; an iterable of batches is returned as it is.

    Raises:
        InputError: `images` is something else.
    """
    if isinstance(images, Tensor):
        split: tuple[Tensor, ...] = images.split(batch_size)
        return split
    if isinstance(images, (str, bytes, Mapping)) or not isinstance(images, Iterable):
        raise InputError(
            f"images is a {type(images).__name__}: pass a tensor (N, 3, H, W), or an iterable of batches such as "
            "DataLoader(dataset, batch_size=64)."
        )
    return images


def batch_arguments(batch: Any, device: torch.device) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return images, further arguments and keyword arguments of the model's forward in a batch, on a device.

    Raises:
        InputError: The batch has no batch of images.
    """
    if isinstance(batch, Mapping):
        moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items() if n != "labels"}
        return None, (), moved
    images = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
    if not isinstance(images, Tensor) or images.ndim < 4:
        shape = f" of shape {tuple(images.shape)}" if isinstance(images, Tensor) else ""
        raise InputError(
            f"A batch holds a {type(images).__name__}{shape} in place of images (B, 3, H, W): give batches, for "
            "example from DataLoader(dataset, batch_size=64)."
        )
    return images.to(device), (), {}


def select_rows(value: Any, rows: Tensor, size: int) -> Any:
    """Rows of every tensor of `size` rows in a (nested) argument of a forward."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and value.shape[0] == size else value
    if isinstance(value, Mapping):
        return {name: v if is_common(name, v) else select_rows(v, rows, size) for name, v in value.items()}
    return value


def is_common(name: str, value: Any) -> bool:
    """Whether an argument is an attention mask for all images (N, N), which may have as many rows as the batch."""
    return name == "attn_mask" and isinstance(value, Tensor) and value.ndim == 2


def with_progress_bar(batches: Iterable[Any], name: str, progress: bool) -> Iterable[Any]:
    """The batches, with a progress bar on a terminal if tqdm is installed."""
    try:
        from tqdm.auto import tqdm  # noqa: PLC0415 - an optional extra
    except ImportError:
        return batches
    bar: Iterable[Any] = tqdm(batches, desc=name, unit="batch", disable=None if progress else True)
    return bar
