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

from lpt_peft._numerics import at_least_float32
from lpt_peft.bank.streams import StreamOrder
from lpt_peft.checkpoint import PromptContent


class Tables(NamedTuple):
    """Tensors of T slots; L blocks of width d, n, m, k, C and key width q of the largest task.

    Group prompts are kept for the last G blocks, G = L - K of the task with the smallest K.
    """

    shared: Tensor
    """(T, L, n, d) shared prompts."""
    groups: Tensor
    """(T, m, G, n, d) group prompts."""
    keys: Tensor
    """(T, m, q) keys of the groups."""
    key_norms: Tensor
    """(T, m) float64 (float32 on MPS)."""
    weights: Tensor
    """(T, k) float64: 1/k of the task for its k groups, 0 for padding."""
    head: Tensor
    """(T, C, feature_dim) class vectors."""
    head_norms: Tensor
    """(T, C) float64."""
    scale: Tensor
    """(T,) float64, scale of the logits."""
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
    classes: int
    """Number of classes `C`."""
    block_k: int
    """1 if the query is read at block K."""


class Sizes(NamedTuple):
    """Sizes of the tables, which the compiled graph depends on."""

    prompt_length: int = 0
    pool_size: int = 0
    top_k: int = 0
    group_layers: int = 0
    num_classes: int = 0
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
        return Sizes(prompt_length=config.prompt_length, num_classes=config.num_classes)
    return Sizes(
        config.prompt_length, config.pool_size, config.top_k, config.group_layers, config.num_classes, config.key_dim
    )


def numbers_of(content: PromptContent) -> TaskNumbers:
    """Return the sizes that the forward needs for a task."""
    config = content.config
    if not uses_groups(content):
        return TaskNumbers(config.prompt_length, config.depth, 0, config.num_classes, 0)
    return TaskNumbers(
        config.prompt_length,
        config.first_group_layer,
        config.pool_size,
        config.num_classes,
        int(config.query == "block_k"),
    )


class SlotTables:
    """The current tables, written by slot.

    Not safe for threads: the registry calls it under its lock.

    Args:
        capacity: Number of slots, without slot 0.
        depth: Blocks `L` of the backbone.
        dim: Width `d` of its tokens.
        feature_dim: Width of its features.
        order: Its device is that of the tables.
        reserved: Sizes that the tables have from the start.

    Attributes:
        tables: The current tensors; replaced, never resized.
        sizes: Their sizes.
    """

    def __init__(
        self, *, capacity: int, depth: int, dim: int, feature_dim: int, order: StreamOrder, reserved: Sizes
    ) -> None:
        self._capacity, self._depth, self._dim, self._feature_dim = capacity, depth, dim, feature_dim
        self._order, device = order, order.device
        self._device = device
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        self._dtype: torch.dtype | None = None
        self.sizes = reserved
        self.tables = self._empty(torch.float32)

    @torch.no_grad()
    def fit(self, content: PromptContent) -> None:
        """Replace the tables by larger or wider tables, if a task does not fit."""
        sizes = self.sizes.join(sizes_of(content))
        dtype = content.tensors["shared.prompts"].dtype if self._dtype is None else self._dtype
        for tensor in _used(content).values():
            dtype = torch.promote_types(dtype, tensor.dtype)
        if sizes == self.sizes and dtype == self._dtype:
            return
        self._order.synchronize()
        self.sizes, self._dtype = sizes, dtype
        new, old = self._empty(dtype), self.tables
        for name in Tables._fields:
            target, source = getattr(new, name), getattr(old, name)
            if name == "groups":
                target = target[:, :, target.shape[2] - source.shape[2] :]
            target[tuple(slice(size) for size in source.shape)] = source
        self.tables = new

    @torch.no_grad()
    def write(self, slot: int, content: PromptContent) -> None:
        """Copy the tensors of a task to a slot, which nobody reads; the task fits."""
        tables, config, tensors = self.tables, content.config, content.tensors
        numbers = numbers_of(content)
        _fill(tables.shared[slot], tensors["shared.prompts"])
        _fill(tables.head[slot], tensors["head.weight"])
        _fill(tables.head_norms[slot], self._norms(tensors["head.weight"]), 1.0)
        weights = torch.zeros(0)
        if numbers.groups:
            groups, target = tensors["pool.prompts"], tables.groups[slot]
            target.zero_()
            _fill(target[:, target.shape[1] - groups.shape[1] :], groups)
            _fill(tables.keys[slot], tensors["pool.keys"])
            _fill(tables.key_norms[slot], self._norms(tensors["pool.keys"]), 1.0)
            weights = torch.full((config.top_k,), 1 / config.top_k, dtype=self._wide)
        _fill(tables.weights[slot], weights)
        tables.scale[slot] = config.logit_scale
        tables.numbers[slot] = torch.tensor(numbers)

    def would_pad(self, numbers: TaskNumbers) -> bool:
        """Whether a task and those before it differ in prompt tokens or in blocks with groups."""
        length, layers = self.sizes.prompt_length, self.sizes.group_layers
        return length not in (0, numbers.length) or (
            numbers.groups > 0 and layers not in (0, self._depth - numbers.first)
        )

    def nbytes(self) -> int:
        """Bytes of the tables."""
        return sum(table.numel() * table.element_size() for table in self.tables)

    def _norms(self, rows: Tensor) -> Tensor:
        norms: Tensor = at_least_float32(rows).to(self._wide).norm(dim=-1)
        return norms.clamp(min=1e-12)  # the limit of F.normalize

    def _empty(self, dtype: torch.dtype) -> Tables:
        rows, sizes, wide = self._capacity + 1, self.sizes, self._wide

        def full(*shape: int, dtype: torch.dtype = dtype, value: float = 0) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=self._device)

        with torch.inference_mode(False):
            tables = Tables(
                shared=full(rows, self._depth, sizes.prompt_length, self._dim),
                groups=full(rows, sizes.pool_size, sizes.group_layers, sizes.prompt_length, self._dim),
                keys=full(rows, sizes.pool_size, sizes.key_dim),
                key_norms=full(rows, sizes.pool_size, dtype=wide, value=1),
                weights=full(rows, sizes.top_k, dtype=wide),
                head=full(rows, sizes.num_classes, self._feature_dim),
                head_norms=full(rows, sizes.num_classes, dtype=wide, value=1),
                scale=full(rows, dtype=wide),
                numbers=full(rows, len(TaskNumbers._fields), dtype=torch.int64),
            )
        tables.numbers[0] = torch.tensor(TaskNumbers(0, self._depth, 0, 0, 0))
        return tables


def _used(content: PromptContent) -> dict[str, Tensor]:
    names = ["shared.prompts", "head.weight", *(["pool.prompts", "pool.keys"] if uses_groups(content) else [])]
    return {name: content.tensors[name] for name in names}


def _fill(target: Tensor, value: Tensor, padding: float = 0.0) -> None:
    """Copy a tensor to the start of a row, and fill the rest."""
    pads: list[Any] = []
    for size, given in zip(reversed(target.shape), reversed(value.shape), strict=True):
        pads += [0, size - given]
    target.copy_(F.pad(value.to(target), pads, value=padding))
