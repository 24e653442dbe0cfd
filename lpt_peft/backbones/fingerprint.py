"""Fingerprint of frozen weights, which shows whether prompts were trained on a backbone.

A pretrained tag does not: timm sets it with `pretrained=False` as well.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from lpt_peft._tensors import gather_full, is_dtensor
from lpt_peft.errors import StateError

ALGORITHM = "sha256-tensors-v1"


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Hash tensors: sha256 of the sorted sha256 of each tensor's (dtype, shape, little-endian bytes), as hex.

    The input for a tensor is the ASCII text `dtype|d0,d1,...|` (torch's name of the dtype, without `torch.`) and its
    contiguous bytes; the hex digests are sorted and joined without a separator. Names are not part of it, so wrapping
    and renaming do not change the result.

    Example:
        >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(2, requires_grad=True)])
        True
        >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(2, 1)])
        False
    """
    digests = sorted(_digest(tensor) for tensor in tensors)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def versions(tensors: Iterable[Tensor]) -> tuple[tuple[object, ...], ...] | None:
    """Return marks that differ when a tensor is changed in place or replaced; None if changes cannot be detected.

    Changes through `.data` are not detected. Sharded tensors give None, because processes could disagree.
    """
    marks = []
    for tensor in tensors:
        if is_dtensor(tensor) or tensor.is_inference():
            return None
        marks.append((tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape))
    return tuple(marks)


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta:
        raise StateError(
            "The backbone has tensors on the meta device (offloaded, or not loaded yet), so it has no fingerprint. "
            "Load its weights first, or remove offloading (accelerate.hooks.remove_hook_from_submodules)."
        )
    shape = ",".join(str(size) for size in tensor.shape)
    head = f"{str(tensor.dtype).removeprefix('torch.')}|{shape}|"
    flat = gather_full(tensor.detach()).cpu().contiguous().flatten()
    # A byte view works for every dtype, including bfloat16, without a copy.
    data = flat.view(torch.uint8).numpy()
    if sys.byteorder == "big":
        data = data.reshape(-1, tensor.element_size())[:, ::-1].copy()
    digest = hashlib.sha256(head.encode())
    digest.update(data.data if data.size else b"")
    return digest.hexdigest()
