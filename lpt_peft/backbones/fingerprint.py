"""Fingerprint of frozen weights: tells whether prompts meet the backbone they were learnt on.

A pretrained tag proves nothing (timm sets it with `pretrained=False` too); the bytes do.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

ALGORITHM = "sha256-tensors-v1"


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """sha256 over the sorted sha256 of each tensor's (dtype, shape, little-endian bytes), as hex.

    A tensor hashes as the ASCII text `dtype|d0,d1,...|` (torch's name of the dtype, without `torch.`)
    and its contiguous bytes; the hex digests are sorted and joined without a separator. Names are left
    out, so wrapping and renaming do not matter.

    Example:
        >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(2, requires_grad=True)])
        True
        >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(2, 1)])
        False
    """
    digests = sorted(_digest(tensor) for tensor in tensors)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def versions(tensors: Iterable[Tensor]) -> tuple[tuple[object, ...], ...] | None:
    """Marks that differ when a tensor was changed in place or replaced; None where that cannot be told.

    Changes through `.data` leave no mark. Sharded tensors have none: processes could come to different answers.
    """
    marks = []
    for tensor in tensors:
        if _is_sharded(tensor) or tensor.is_inference():
            return None
        marks.append((tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape))
    return tuple(marks)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or gathered from all processes where FSDP2 has sharded it."""
    gathered: Tensor = tensor.full_tensor() if _is_sharded(tensor) else tensor
    return gathered


def _is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; its module is slow to import, and there are none before something else imports it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _digest(tensor: Tensor) -> str:
    shape = ",".join(str(size) for size in tensor.shape)
    head = f"{str(tensor.dtype).removeprefix('torch.')}|{shape}|"
    flat = whole(tensor.detach()).cpu().contiguous().flatten()
    # A byte view of every dtype, bfloat16 too, without a copy; numpy carries the buffer protocol.
    data = flat.view(torch.uint8).numpy()
    if sys.byteorder == "big":
        data = data.reshape(-1, tensor.element_size())[:, ::-1].copy()
    digest = hashlib.sha256(head.encode())
    digest.update(data.data if data.size else b"")
    return digest.hexdigest()
