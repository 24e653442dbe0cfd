"""The forward of a bank: images and the slot of each image to padded logits.

Prompts, keys and class vectors of an image are gathered from the tables by its slot. Images with fewer prompt tokens
than the tables, or without groups in a block, have padding tokens, which attention excludes by a mask. Not here: the
tables (`tables.py`), and which tasks are in them (`registry.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt_peft._numerics import full_precision
from lpt_peft.backbones.base import Backbone, Stream
from lpt_peft.bank.tables import Tables, TaskNumbers
from lpt_peft.prompting import Prompt, set_prompt_mask


class Mode(NamedTuple):
    """Steps that a batch needs; a graph is compiled for each combination that occurs."""

    prompts: bool
    """An image has prompts."""
    first_pass: bool
    """An image needs the feature under the shared prompts, as its feature or as its query."""
    groups: bool
    """An image selects groups: the blocks after K run with group prompts."""
    block_k: bool
    """An image selects its groups by the query at block K."""
    masked: bool
    """Images differ in prompt tokens or in K, so that padding must be excluded."""


def mode_of(numbers: Sequence[TaskNumbers], tables: Tables) -> Mode:
    """Return the steps that a batch needs, from the sizes of the task of each image."""
    distinct = set(numbers)
    length, split = tables.shared.shape[2], tables.shared.shape[1] - tables.groups.shape[2]
    grouped = [task for task in distinct if task.groups]
    prompts = any(task.length for task in distinct)
    padded = any(task.length != length for task in distinct) or any(task.first != split for task in grouped)
    return Mode(
        prompts=prompts,
        first_pass=any(not (task.groups and task.block_k) for task in distinct),
        groups=bool(grouped),
        block_k=any(task.block_k for task in grouped),
        masked=prompts and padded,
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
    shared: list[Prompt]
    """For each block, the prompts (B, n, d) in the dtype of the tokens; None for a batch without prompts."""
    counts: Tensor
    """(B, n) bool, False for padding of `shared`."""

    def number(self, name: str) -> Tensor:
        """Return a column (B,) of the numbers."""
        return self.numbers[:, TaskNumbers._fields.index(name)]

    def run_shared(self, stream: Stream, start: int, stop: int) -> Stream:
        """Run blocks with the shared prompts."""
        mask = self.counts if self.mode.masked else None
        for block in range(start, stop):
            stream = run_block_masked(self.backbone, stream, block, self.shared[block], mask)
        return stream


def bank_forward(
    backbone: Backbone, tables: Tables, mode: Mode, images: Tensor, task: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the answers of a batch.

    Args:
        backbone: The wrapped ViT.
        tables: Tensors of all slots.
        mode: What the batch needs.
        images: (B, 3, H, W), or what the ViT's forward takes.
        task: Slots (B,) int64.

    Returns:
        Logits (B, C) with -inf beyond the classes of a task, features (B, feature_dim), and groups (B, k) int64.
    """
    depth = tables.shared.shape[1]
    split = depth - tables.groups.shape[2]
    stream = backbone.embed(images)
    numbers = tables.numbers[task]
    shared: list[Prompt] = [None] * depth
    if mode.prompts:
        shared = list(tables.shared[task].to(stream.tokens.dtype).unbind(1))
    counts = torch.arange(tables.shared.shape[2], device=task.device) < numbers[:, :1]
    batch = Batch(backbone, tables, mode, task, numbers, shared, counts)
    kept = batch.run_shared(stream, 0, split)
    feature = backbone.pool(batch.run_shared(kept, split, depth)) if mode.first_pass else None
    groups = task.new_zeros(task.shape[0], tables.weights.shape[1])
    if mode.groups:
        grouped, groups = _group_pass(batch, kept, groups if feature is None else _select(batch, feature))
        feature = grouped if feature is None else torch.where(batch.number("groups")[:, None] > 0, grouped, feature)
    assert feature is not None  # noqa: S101 - a batch needs at least one of the passes; narrows the type
    return _logits(batch, feature), feature, groups


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
    backbone, tables, task = batch.backbone, batch.tables, batch.task
    depth = tables.shared.shape[1]
    split = depth - tables.groups.shape[2]
    first = batch.number("first")
    weights = tables.weights[task].to(stream.tokens.dtype)
    for block in range(split, depth):
        if batch.mode.block_k:
            here = (first == block) & (batch.number("block_k") > 0)
            groups = torch.where(here[:, None], _select(batch, _block_query(backbone, stream)), groups)
        selected = tables.groups[task[:, None], groups, block - split].to(stream.tokens.dtype)
        mean = (weights[:, None] @ selected.flatten(2)).unflatten(2, selected.shape[2:]).squeeze(1)
        shared, mask = batch.shared[block], None
        assert isinstance(shared, Tensor)  # noqa: S101 - a batch with groups has prompts; narrows the type
        if batch.mode.masked:
            mask = torch.cat([batch.counts, batch.counts & (first <= block)[:, None]], 1)
        stream = run_block_masked(backbone, stream, block, torch.cat([shared, mean], 1), mask)
    return backbone.pool(stream), groups


def _block_query(backbone: Backbone, stream: Stream) -> Tensor:
    token = backbone.class_token(stream)
    token = backbone.mean_patch(stream) if token is None else token
    return F.layer_norm(token, token.shape[-1:])


def _select(batch: Batch, query: Tensor) -> Tensor:
    """Groups (B, k) whose keys are nearest to the queries (B, key_dim)."""
    tables = batch.tables
    cosines = _cosines(query, tables.keys[batch.task], tables.key_norms[batch.task])
    padding = torch.arange(cosines.shape[1], device=cosines.device) >= batch.number("groups")[:, None]
    return cosines.masked_fill(padding, -torch.inf).topk(tables.weights.shape[1], dim=-1)[1]


def _logits(batch: Batch, feature: Tensor) -> Tensor:
    tables = batch.tables
    cosines = _cosines(feature, tables.head[batch.task], tables.head_norms[batch.task])
    padding = torch.arange(cosines.shape[1], device=cosines.device) >= batch.number("classes")[:, None]
    logits = tables.scale[batch.task].to(cosines.dtype)[:, None] * cosines
    return logits.masked_fill(padding, -torch.inf)


def _cosines(queries: Tensor, vectors: Tensor, norms: Tensor) -> Tensor:
    """Cosines (B, m) of queries (B, q) with vectors (B, m, q) of norms (B, m); float32 or float64."""
    with full_precision(queries.device.type):
        wide = torch.promote_types(torch.promote_types(queries.dtype, vectors.dtype), torch.float32)
        units = F.normalize(queries.to(wide), dim=-1)
        units = F.pad(units, (0, vectors.shape[2] - units.shape[1]))  # tasks may have queries of two widths
        return (vectors.to(wide) @ units.unsqueeze(2)).squeeze(2) / norms.to(wide)
