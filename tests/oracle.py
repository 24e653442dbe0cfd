"""Oracle of prompted blocks: token concatenation by hooks, written from the equations.

Prompt tokens are appended to each block's input and their outputs are dropped. This is slow, and wrong for rotary ViTs,
but clearly right for the others. It does not use lpt_peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def concatenated_prompts(blocks: Sequence[nn.Module], prompts: Sequence[Tensor | None]) -> Iterator[None]:
    """Let block i run on `[x; prompts[i]]`, (n, d) or (B, n, d), and return the first N tokens; a context."""
    handles = []
    for block, prompt in zip(blocks, prompts, strict=True):
        if prompt is None:
            continue

        def before(_: nn.Module, args: tuple[Tensor, ...], prompt: Tensor = prompt) -> tuple[Tensor, ...]:
            x, *rest = args
            return (torch.cat([x, prompt.expand(len(x), -1, -1)], 1), *rest)

        def after(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, prompt: Tensor = prompt) -> Tensor:
            return out[:, : out.shape[1] - prompt.shape[-2]]

        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lpt_by_concatenation(
    vit: nn.Module,
    images: Tensor,
    shared: Tensor,
    groups: Tensor,
    keys: Tensor,
    weight: Tensor,
    top_k: int,
    scale: float,
) -> dict[str, Tensor]:
    """Compute the method on a plain timm ViT, all passes from block 1: logits, query, similarity, groups."""
    first = len(shared) - groups.shape[1]
    with torch.no_grad(), concatenated_prompts(vit.blocks, list(shared)):
        query = vit.forward_head(vit.forward_features(images), pre_logits=True)
    chosen, picks, similarities = [], [], []
    for feature in query:  # image by image, so that no image affects another
        similarity = torch.stack([torch.cosine_similarity(feature, key, dim=0) for key in keys])
        order = sorted(range(len(keys)), key=lambda i: -float(similarity[i].detach()))[:top_k]
        picks.append(order)
        similarities.append(similarity[order])
        chosen.append(sum(groups[i] for i in order) / top_k)
    prompts: list[Tensor] = list(shared[:first])
    for layer in range(first, len(shared)):
        own = torch.stack([prompt[layer - first] for prompt in chosen])
        prompts.append(torch.cat([shared[layer].expand(len(images), -1, -1), own], 1))
    with concatenated_prompts(vit.blocks, prompts):
        features = vit.forward_head(vit.forward_features(images), pre_logits=True)
    normed = features / features.norm(dim=-1, keepdim=True)
    logits = scale * normed @ (weight / weight.norm(dim=-1, keepdim=True)).T
    return {
        "logits": logits,
        "features": features,
        "query": query,
        "similarity": torch.stack(similarities),
        "groups": torch.tensor(picks),
    }
