"""Other methods to adapt a frozen ViT, for comparison in the benchmarks; for timm's VisionTransformer only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FrozenWithHead(nn.Module):
    """A frozen ViT and a linear classifier on its features."""

    def __init__(self, vit: Any, num_classes: int) -> None:
        super().__init__()
        self.vit: Any = vit.requires_grad_(False)
        self.head = nn.Linear(vit.num_features, num_classes, device=next(vit.parameters()).device)

    def features(self, images: Tensor) -> Tensor:
        """The input of the head, (B, d)."""
        features: Tensor = self.vit.forward_head(self.vit.forward_features(images), pre_logits=True)
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).to(self.head.weight.dtype))
        return logits


class LinearProbe(FrozenWithHead):
    """Trains only the head; the ViT runs without gradient."""

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return super().features(images)


class LoRALinear(nn.Module):
    """`linear(x) + alpha / rank * B A x` around a frozen linear layer; B starts at zero (arXiv 2106.09685)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.down.to(x.dtype))
        update = nn.functional.linear(low, self.up.to(x.dtype)) * self.scale
        plain: Tensor = self.linear(x)
        return plain + update


class LoRA(FrozenWithHead):
    """Trains low-rank updates of `qkv` in every block, and the head."""

    def __init__(self, vit: nn.Module, num_classes: int, rank: int = 16, alpha: float = 16.0) -> None:
        super().__init__(vit, num_classes)
        for block in self.vit.blocks:
            block.attn.qkv = LoRALinear(block.attn.qkv, rank, alpha)


class TokenConcatenation(FrozenWithHead):
    """VPT-Deep (arXiv 2203.12119): trains prompt tokens for every block, and the head.

    Hooks append the tokens before a block and drop them after it.
    """

    def __init__(self, vit: nn.Module, num_classes: int, prompt_length: int = 10) -> None:
        super().__init__(vit, num_classes)
        device = self.head.weight.device
        self.prompts = nn.Parameter(
            torch.randn(len(self.vit.blocks), prompt_length, self.vit.embed_dim, device=device) * 0.02
        )
        for index, block in enumerate(self.vit.blocks):
            block.register_forward_pre_hook(lambda block, args, index=index: (self._with_prompt(args[0], index),))
            block.register_forward_hook(lambda block, args, out: out[:, : out.shape[1] - prompt_length])

    def _with_prompt(self, x: Tensor, index: int) -> Tensor:
        prompt = self.prompts[index].to(x.dtype)
        return torch.cat([x, prompt.expand(len(x), -1, -1)], 1)
