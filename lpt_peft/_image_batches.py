"""Batches of images from a tensor or a loader, and rows of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lpt_peft.errors import InputError

_LABELS = ("labels", "label")


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


def read_batch(batch: Any, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """Return the first argument and the keyword arguments of the model's forward in a batch, on a device.

    Args:
        batch: Images (B, C, H, W); a mapping of arguments of the forward, or with the images as "pixel_values", whose
            labels are left out; padded patches of timm ("patches", "patch_coord", ...); or a sequence that starts with
            any of them, such as (images, labels).
        device: Of the tensors.

    Returns:
        Images, or None if they are among the keyword arguments.

    Raises:
        InputError: The batch has no batch of images.
    """
    found = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
    if isinstance(found, Mapping):
        if not any(isinstance(value, Tensor) and value.ndim > 2 for value in found.values()):
            raise InputError(
                f"A batch has the keys {', '.join(map(str, found)) or '(none)'} and no images: give the images "
                '(B, 3, H, W) under the key "pixel_values".'
            )
        moved = {n: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for n, v in found.items()}
        if "patches" in moved:
            return moved, {}
        return None, {name: value for name, value in moved.items() if name not in _LABELS}
    if not isinstance(found, Tensor) or found.ndim < 4:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise InputError(
            f"A batch holds a {type(found).__name__}{shape} in place of images (B, 3, H, W): give batches, for "
            "example from DataLoader(dataset, batch_size=64)."
        )
    return found.to(device, non_blocking=True), {}


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
