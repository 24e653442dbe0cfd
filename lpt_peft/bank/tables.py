"""Tables of fixed capacity that hold the tensors of the tasks, a row per slot.

A slot is a row of every table. Row 0 is the plain model: no prompts, no classes. Rows are padded to the sizes of the
largest task; when a larger task comes, new tables replace the old, which batches that are running keep. Not here: which
task is in which slot (`registry.py`), and the forward (`forward.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt_peft.bank.streams import StreamOrder
from lpt_peft.checkpoint import PromptContent


class Tables(NamedTuple):
    """Tensors of T slots; L blocks of width d, n, m and key width q of the largest task.

    Group prompts are kept for the last G blocks, G = L - K of the task with the smallest K.
    """

    shared: Tensor
    """(T, L, n, d) shared prompts."""
    groups: Tensor
    """(T, m, G, n, d) group prompts."""
    keys: Tensor
    """(T, m, q) keys of the groups."""
    numbers: Tensor
    """(T, 5) int64: see `TaskNumbers`."""


class TaskNumbers(NamedTuple):
    """Sizes of a task, a row of `Tables.numbers`."""

    length: int
    """Prompt tokens `n`; 0 for the plain model."""
    first: int
    """First block with group prompts, `K`; L without groups."""
    groups: int
    """Number of groups `m`; 0 in phase "shared"."""
    top_k: int
    """Selected groups `k`; 0 in phase "shared"."""
    block_k: int
    """1 if the query is read at block K."""


class Sizes(NamedTuple):
    """Sizes of the tables, which the compiled graph depends on."""

    depth: int = 0
    prompt_length: int = 0
    pool_size: int = 0
    top_k: int = 0
    group_layers: int = 0
    key_dim: int = 0

    def join(self, other: Sizes) -> Sizes:
        """Return the larger of each size."""
        return Sizes(*map(max, self, other))


def uses_groups(content: PromptContent) -> bool:
    """Whether the group prompts of a prompt file take part in its answers."""
    return content.phase == "group"


def sizes_of(content: PromptContent) -> Sizes:
    """Return the sizes that the tables need for a task."""
    config = content.config
    if not uses_groups(content):
        return Sizes(config.depth, config.prompt_length)
    return Sizes(
        config.depth, config.prompt_length, config.pool_size, config.top_k, config.group_layers, config.key_dim
    )


def numbers_of(content: PromptContent) -> TaskNumbers:
    """Return the sizes that the forward needs for a task."""
    config = content.config
    if not uses_groups(content):
        return TaskNumbers(config.prompt_length, config.depth, 0, 0, 0)
    block_k = int(config.query == "block_k")
    return TaskNumbers(config.prompt_length, config.first_group_layer, config.pool_size, config.top_k, block_k)


class SlotTables:
    """The current tables, written by slot.

    Not safe for threads: the registry calls it under its lock.

    Args:
        capacity: Number of slots, without slot 0.
        dim: Width `d` of the tokens.
        order: Its device is that of the tables.
        reserved: Sizes that the tables have from the start.

    Attributes:
        tables: The current tensors; replaced, never resized.
        sizes: Their sizes.
    """

    def __init__(self, *, capacity: int, dim: int, order: StreamOrder, reserved: Sizes) -> None:
        self._capacity, self._dim, self._order = capacity, dim, order
        self._dtype: torch.dtype | None = None
        self.sizes = reserved
        self.tables = self._empty(reserved, torch.float32)

    @torch.no_grad()
    def fit(self, content: PromptContent) -> None:
        """Replace the tables by larger or wider tables, if a task does not fit."""
        sizes = self.sizes.join(sizes_of(content))
        dtype = content.tensors["shared.prompts"].dtype if self._dtype is None else self._dtype
        for tensor in _used(content):
            dtype = torch.promote_types(dtype, tensor.dtype)
        if sizes == self.sizes and dtype == self._dtype:
            return
        self._order.synchronize()
        new, old = self._empty(sizes, dtype), self.tables
        # Blocks of group prompts are counted from the last.
        last = new.groups[:, :, sizes.group_layers - self.sizes.group_layers :]
        for target, source in zip(new._replace(groups=last), old, strict=True):
            target[tuple(slice(size) for size in source.shape)] = source
        self.tables, self.sizes, self._dtype = new, sizes, dtype

    @torch.no_grad()
    def write(self, slot: int, content: PromptContent) -> None:
        """Copy the prompts of a task to a slot, which nobody reads; the task fits."""
        tables, tensors, numbers = self.tables, content.tensors, numbers_of(content)
        _fill(tables.shared[slot], tensors["shared.prompts"])
        if numbers.groups:
            groups, target = tensors["pool.prompts"], tables.groups[slot]
            target.zero_()
            _fill(target[:, target.shape[1] - groups.shape[1] :], groups)
            _fill(tables.keys[slot], tensors["pool.keys"])
        tables.numbers[slot] = torch.tensor(numbers)

    def would_pad(self, numbers: TaskNumbers) -> bool:
        """Whether a task and those before it differ in prompt tokens or in blocks with groups."""
        length, layers = self.sizes.prompt_length, self.sizes.group_layers
        return length not in (0, numbers.length) or (
            numbers.groups > 0 and layers not in (0, self.sizes.depth - numbers.first)
        )

    def nbytes(self) -> int:
        """Bytes of the tables."""
        return sum(table.nbytes for table in self.tables)

    def _empty(self, sizes: Sizes, dtype: torch.dtype) -> Tables:
        rows, device = self._capacity + 1, self._order.device
        with torch.inference_mode(False):
            tables = Tables(
                torch.zeros(rows, sizes.depth, sizes.prompt_length, self._dim, dtype=dtype, device=device),
                torch.zeros(
                    (rows, sizes.pool_size, sizes.group_layers, sizes.prompt_length, self._dim),
                    dtype=dtype,
                    device=device,
                ),
                torch.zeros(rows, sizes.pool_size, sizes.key_dim, dtype=dtype, device=device),
                torch.zeros(rows, len(TaskNumbers._fields), dtype=torch.int64, device=device),
            )
        tables.numbers[0] = torch.tensor(TaskNumbers(0, sizes.depth, 0, 0, 0))
        return tables


def _used(content: PromptContent) -> list[Tensor]:
    names = ["shared.prompts", *(["pool.prompts", "pool.keys"] if uses_groups(content) else [])]
    return [content.tensors[name] for name in names]


def _fill(target: Tensor, value: Tensor) -> None:
    """Copy a tensor to the start of a row, and fill the rest with 0."""
    pads: list[Any] = []
    for size, given in zip(reversed(target.shape), reversed(value.shape), strict=True):
        pads += [0, size - given]
    target.copy_(F.pad(value.to(target), pads))
