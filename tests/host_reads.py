"""Counts operations that would synchronize the host with a device, using CPU tensors.

A dispatch mode intercepts ATen operators. A function mode intercepts methods that copy to the host without an operator
on the CPU. Both cover eager code on the calling thread only; backward of CPU tensors also runs on this thread.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that read a value, or whose output size depends on values: they synchronize a CUDA stream.
_READS = {
    "aten._local_scalar_dense",  # item(), bool(), int(), float(), a tensor used as a condition
    "aten.is_nonzero",
    "aten.nonzero",
    "aten.equal",
    "aten.allclose",
    "aten.masked_select",
    "aten.bincount",
    "aten._unique",
    "aten._unique2",
    "aten.unique_dim",
    "aten.unique_consecutive",
    "aten.repeat_interleave",  # with a tensor of repeats and no output_size
}
_INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}
_METHODS = {getattr(Tensor, name): f"Tensor.{name}" for name in ("tolist", "numpy", "cpu", "__array__")}


class HostReads(list[str]):
    """Names of the operations in call order, with their source lines in `locations`."""

    def __init__(self) -> None:
        super().__init__()
        self.locations: list[str] = []

    def add(self, name: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        caller = next(frame for frame in reversed(frames) if frame.filename != __file__)
        self.append(name)
        self.locations.append(f"{name} at {caller.filename}:{caller.lineno}: {caller.line}")


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name.replace("::", ".")
        sized = kwargs.get("output_size") is not None  # repeat_interleave needs no read in this case
        if (name in _READS and not sized) or (name in _INDEXING and _has_mask(args[1])):
            self._reads.add(name)
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METHODS:
            self._reads.add(_METHODS[func])
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


@contextmanager
def count_host_reads() -> Iterator[HostReads]:
    """Collect the host reads of the enclosed code.

    Example:
        >>> with count_host_reads() as reads:
        ...     _ = torch.ones(3).sum().item()
        >>> reads
        ['aten._local_scalar_dense']
    """
    reads = HostReads()
    with _Methods(reads), _Operators(reads):
        yield reads
