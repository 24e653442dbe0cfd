"""Tiny adapters with random prompts, and comparisons, for the tests of this folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lpt_peft import LongTailPromptAdapter
from lpt_peft._prompt_content import content_of
from lpt_peft.checkpoint import Encoded, PromptContent, encode
from tests.conftest import tiny_vit

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAMES = {"config.json", "prompts.safetensors"}


def tiny_adapter(
    phase: str = "group",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    vit: nn.Module | None = None,
    num_classes: int = 7,
    **sizes: Any,
) -> LongTailPromptAdapter:
    """An adapter on `tiny_vit()` in eval mode, with prompts that depend on the seed."""
    vit = tiny_vit() if vit is None else vit
    sizes = {"prompt_length": 3, "pool_size": 5, "top_k": 2, "query": "final", **sizes}
    adapter = LongTailPromptAdapter.wrap(vit, num_classes, **sizes)
    for module in (adapter.shared, adapter.pool, adapter.head):
        module.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    adapter.load_adapter_state_dict(
        {name: torch.randn(shape, generator=generator) for name, shape in adapter.prompt_config.tensor_shapes.items()}
    )
    adapter.phase = phase
    return adapter.eval()


def encode_adapter(adapter: LongTailPromptAdapter, **options: Any) -> Encoded:
    """The bytes that `save_pretrained` writes."""
    return encode(content_of(adapter, **options))


@cache
def tiny_content(seed: int = 0, **options: Any) -> PromptContent:
    """Content of a tiny adapter's prompt file."""
    return content_of(tiny_adapter(seed=seed), **options)


@cache
def tiny_encoded(seed: int = 0) -> Encoded:
    """Bytes of a tiny adapter's prompt file."""
    return encode(tiny_content(seed))


def contents(folder: Path) -> dict[str, bytes]:
    """Name and bytes of each file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def snapshot(vit: nn.Module) -> tuple[dict[str, tuple[torch.Tensor, torch.dtype]], list[type], list[bool]]:
    """Tensors, classes and requires_grad of a ViT."""
    tensors = {name: (tensor.clone(), tensor.dtype) for name, tensor in vit.state_dict().items()}
    return tensors, [type(module) for module in vit.modules()], [p.requires_grad for p in vit.parameters()]


def same_snapshot(left: Any, right: Any) -> bool:
    """Whether two snapshots are equal, bit for bit."""
    equal = left[0].keys() == right[0].keys() and all(
        torch.equal(left[0][name][0], right[0][name][0]) and left[0][name][1] == right[0][name][1] for name in left[0]
    )
    return equal and left[1:] == right[1:]
