"""The forward of a bank: images and the slot of each image to features and selected groups.

Prompts and keys of an image are gathered from the tables by its slot. Images with fewer prompt tokens than others of
the batch, or without groups in a block, have padding tokens, which attention excludes by a mask. Not here: the tables
(`tables.py`), which tasks are in them (`registry.py`), and the classifiers (`heads.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt_peft._numerics import at_least_float32, full_precision
from lpt_peft.backbones.base import Backbone, Stream
from lpt_peft.bank.tables import Sizes, Tables, TaskNumbers
from lpt_peft.prompting import Prompt, set_prompt_mask


class Mode(NamedTuple):
    """Sizes and steps of a batch; a graph is compiled for each combination that occurs."""

    length: int
    """Prompt tokens `n` of an image, with padding; 0 for a batch without prompts."""
    split: int
    """First block that runs with group prompts; L for a batch without groups."""
    top_k: int
    """Selected groups `k` of an image, with padding."""
    query_blocks: tuple[int, ...]
    """Blocks before which images may select their groups by the query at block K."""
    first_pass: bool
    """An image needs the feature under the shared prompts, as its feature or as its query."""
    masked: bool
    """Images differ in prompt tokens or in K, so that padding must be excluded."""


def mode_of(numbers: Sequence[TaskNumbers], sizes: Sizes | None) -> Mode:
    """Return the sizes and steps of a batch.

    Args:
        numbers: Sizes of the task of each image.
        sizes: Sizes of the tables for a graph that serves all tasks; None for the smallest sizes of this batch.
    """
    tasks = set(numbers)
    length, split = max(task.length for task in tasks), min(task.first for task in tasks)
    top_k = max(task.top_k for task in tasks)
    grouped = [task for task in tasks if task.groups]
    query_blocks = sorted({task.first for task in grouped if task.block_k})
    if sizes is not None:
        length = sizes.prompt_length if length else 0
        if grouped:
            split, top_k = sizes.depth - sizes.group_layers, sizes.top_k
        if query_blocks:
            query_blocks = list(range(split, sizes.depth))
    padded = any(task.length != length for task in tasks) or any(task.first != split for task in grouped)
    return Mode(
        length=length,
        split=split,
        top_k=top_k,
        query_blocks=tuple(query_blocks),
        first_pass=any(not (task.groups and task.block_k) for task in tasks),
        masked=length > 0 and padded,
    )


class Batch(NamedTuple):
    """What the steps of a forward share."""

    backbone: Backbone
    tables: Tables
    mode: Mode
    task: Tensor
    """(B,) int64, slots."""
    numbers: Tensor
    """(B, 5) int64, see `TaskNumbers`."""
    counts: Tensor | None
    """(B, n) bool, False for padding of the prompts; None without padding."""

    def number(self, name: str) -> Tensor:
        """Return a column (B,) of the numbers."""
        return self.numbers[:, TaskNumbers._fields.index(name)]

    def shared(self, block: int, dtype: torch.dtype) -> Tensor:
        """Return the shared prompts (B, n, d) of a block."""
        return self.tables.shared[:, block, : self.mode.length][self.task].to(dtype)

    def run_shared(self, stream: Stream, start: int, stop: int) -> Stream:
        """Run blocks with the shared prompts."""
        for block in range(start, stop):
            prompt = self.shared(block, stream.tokens.dtype) if self.mode.length else None
            stream = run_block_masked(self.backbone, stream, block, prompt, self.counts)
        return stream


def bank_forward(backbone: Backbone, tables: Tables, mode: Mode, images: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the features of a batch.

    Args:
        backbone: The wrapped ViT.
        tables: Tensors of all slots.
        mode: What the batch needs.
        images: (B, 3, H, W), or what the ViT's forward takes.
        task: Slots (B,) int64.

    Returns:
        Features (B, feature_dim) and groups (B, k) int64, valid up to the `top_k` of a task.
    """
    depth = len(backbone.blocks)
    stream = backbone.embed(images)
    numbers = tables.numbers[task]
    counts = torch.arange(mode.length, device=task.device) < numbers[:, :1] if mode.masked else None
    batch = Batch(backbone, tables, mode, task, numbers, counts)
    kept = batch.run_shared(stream, 0, mode.split)
    feature = backbone.pool(batch.run_shared(kept, mode.split, depth)) if mode.first_pass else None
    groups = task.new_zeros(task.shape[0], mode.top_k)
    if mode.split < depth:
        grouped, groups = _group_pass(batch, kept, groups if feature is None else _select(batch, feature))
        feature = grouped if feature is None else torch.where(batch.number("groups")[:, None] > 0, grouped, feature)
    assert feature is not None  # noqa: S101 - a batch needs at least one of the passes; narrows the type
    return feature, groups


def run_block_masked(backbone: Backbone, stream: Stream, block: int, prompt: Prompt, mask: Tensor | None) -> Stream:
    """Run a block with a prompt (B, n, d) and its mask (B, n), or None."""
    if mask is None:
        return backbone.run(stream, block, [prompt])
    set_prompt_mask(mask)
    try:
        return backbone.run(stream, block, [prompt])
    finally:
        set_prompt_mask(None)


def _group_pass(batch: Batch, stream: Stream, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Run the blocks from the first with group prompts of any task, in which an image has its shared prompt up to K.

    Args:
        batch: The batch.
        stream: Tokens that enter that block.
        groups: (B, k) int64, selected by the final query; those of the block-K query are selected here.

    Returns:
        Features (B, feature_dim), and selected groups (B, k).
    """
    backbone, tables, mode, task = batch.backbone, batch.tables, batch.mode, batch.task
    depth, dtype = len(backbone.blocks), stream.tokens.dtype
    first, top_k = batch.number("first"), batch.number("top_k")[:, None]
    weights = (torch.arange(mode.top_k, device=task.device) < top_k).to(dtype) / top_k.clamp(min=1)
    for block in range(mode.split, depth):
        if block in mode.query_blocks:
            here = (first == block) & (batch.number("block_k") > 0)
            groups = torch.where(here[:, None], _select(batch, _block_query(backbone, stream)), groups)
        layer = tables.groups[:, :, block - depth, : mode.length]
        selected = layer[task[:, None], groups].to(dtype)
        mean = (weights[:, None] @ selected.flatten(2)).unflatten(2, selected.shape[2:]).squeeze(1)
        mask = batch.counts
        if mask is not None:
            mask = torch.cat([mask, mask & (first <= block)[:, None]], 1)
        prompt = torch.cat([batch.shared(block, dtype), mean], 1)
        stream = run_block_masked(backbone, stream, block, prompt, mask)
    return backbone.pool(stream), groups


def _block_query(backbone: Backbone, stream: Stream) -> Tensor:
    token = backbone.class_token(stream)
    token = backbone.mean_patch(stream) if token is None else token
    return F.layer_norm(token, token.shape[-1:])


def _select(batch: Batch, query: Tensor) -> Tensor:
    """Groups (B, k) whose keys are nearest to the queries (B, key_dim)."""
    with full_precision(query.device.type):
        query, keys = at_least_float32(query), at_least_float32(batch.tables.keys[batch.task])
        wide = torch.promote_types(query.dtype, keys.dtype)
        units = F.normalize(query.to(wide), dim=-1)
        units = F.pad(units, (0, keys.shape[2] - units.shape[1]))  # tasks may have queries of two widths
        cosines = (F.normalize(keys.to(wide), dim=-1) @ units.unsqueeze(2)).squeeze(2)
    padding = torch.arange(cosines.shape[1], device=cosines.device) >= batch.number("groups")[:, None]
    return cosines.masked_fill(padding, -torch.inf).topk(batch.mode.top_k, dim=-1)[1]
