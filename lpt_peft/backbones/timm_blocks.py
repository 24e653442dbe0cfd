"""timm's transformer blocks with prompt keys and values: one subclass per class of `vision_transformer.py`.

Without a prompt each runs the original forward, bit for bit. With one (1 or B, n, d), given to a block
before its norm and to an attention after it, attention also reads the prompt's keys and values. Not
here: how classes are swapped (`lpt_peft.attention`) and the whole model (`timm_vit.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention, DiffAttention
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor

from lpt_peft.attention import Prompted, append, extend_mask
from lpt_peft.backbones.timm_attend import Triple, attend, weights


class PromptedAttention(Prompted, Attention):
    """Multi-head attention, with qk-norm, output norm and gate where the model has them."""

    original = Attention

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, prompt: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return Attention.forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
        q, k, v = self._project(x)
        # q alone must not keep the packed buffer alive: k and v are copied by the concatenation.
        q = q.contiguous()
        _, k_prompt, v_prompt = self._project(prompt)
        mask = extend_mask(attn_mask, is_causal, x, prompt.shape[-2])
        out = attend(self, q, append(k, k_prompt), append(v, v_prompt), mask)
        out = self.norm(rearrange(out, "b h n e -> b n (h e)"))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _project(self, x: Tensor) -> Triple:
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads)
        return self.q_norm(q), self.k_norm(k), v


class PromptedDiffAttention(Prompted, DiffAttention):
    """Differential attention: two softmaxes over the same values, prompt keys split like keys."""

    original = DiffAttention

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, prompt: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return DiffAttention.forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
        q, k, v = self._project(x)
        _, k_prompt, v_prompt = self._project(prompt)
        mask = extend_mask(attn_mask, is_causal, x, prompt.shape[-2])
        out = _attend_difference(self, q.contiguous(), append(k, k_prompt), append(v, v_prompt), mask)
        return self.proj_drop(self.proj(self.norm(rearrange(out, "b h n e -> b n (h e)"))))

    def _project(self, x: Tensor) -> Triple:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return _split_difference(self, q, k, v)


class PromptedBlock(Prompted, Block):
    """Pre-norm block."""

    original = Block

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, prompt: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return Block.forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal, prompt=self.norm1(prompt))
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PromptedResPostBlock(Prompted, ResPostBlock):
    """Post-norm block: attention sees tokens and prompts as they are."""

    original = ResPostBlock

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, prompt: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return ResPostBlock.forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
        attended = self.attn(x, attn_mask=attn_mask, is_causal=is_causal, prompt=prompt)
        x = x + self.drop_path1(self.norm1(attended))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class PromptedParallelThingsBlock(Prompted, ParallelThingsBlock):
    """Several attentions side by side, each with its own norm, then several MLPs."""

    original = ParallelThingsBlock

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, prompt: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return ParallelThingsBlock.forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
        branches = []
        for branch in self.attns:
            y = branch.attn(branch.norm(x), attn_mask=attn_mask, is_causal=is_causal, prompt=branch.norm(prompt))
            branches.append(branch.drop_path(branch.ls(y)))
        x = x + torch.stack(branches).sum(dim=0)
        return x + torch.stack([ffn(x) for ffn in self.ffns]).sum(dim=0)


class PromptedParallelScalingBlock(Prompted, ParallelScalingBlock):
    """Attention and MLP in parallel behind one projection."""

    original = ParallelScalingBlock

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, prompt: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return ParallelScalingBlock.forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
        hidden, (q, k, v) = self._project(x)
        _, (_, k_prompt, v_prompt) = self._project(prompt)
        mask = extend_mask(attn_mask, is_causal, x, prompt.shape[-2])
        out = attend(self, q, append(k, k_prompt), append(v, v_prompt), mask)
        return _add_parallel(self, x, rearrange(out, "b h n e -> b n (h e)"), hidden)

    def _project(self, x: Tensor) -> tuple[Tensor, Triple]:
        hidden, q, k, v = torch.split(self.in_proj(self.in_norm(x)), self.in_split, dim=-1)
        q, k, v = (rearrange(part, "b n (h e) -> b n h e", h=self.num_heads) for part in (q, k, v))
        return hidden, (self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2))


class PromptedDiffParallelScalingBlock(Prompted, DiffParallelScalingBlock):
    """Differential attention and MLP in parallel behind one projection."""

    original = DiffParallelScalingBlock

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, prompt: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return DiffParallelScalingBlock.forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
        hidden, (q, k, v) = self._project(x)
        _, (_, k_prompt, v_prompt) = self._project(prompt)
        mask = extend_mask(attn_mask, is_causal, x, prompt.shape[-2])
        out = _attend_difference(self, q, append(k, k_prompt), append(v, v_prompt), mask)
        return _add_parallel(self, x, rearrange(out, "b h n e -> b n (h e)"), hidden)

    def _project(self, x: Tensor) -> tuple[Tensor, Triple]:
        hidden, q, k, v = torch.split(self.in_proj(self.in_norm(x)), self.in_split, dim=-1)
        return hidden, _split_difference(self, q, k, v)


def _split_difference(module: Any, q: Tensor, k: Tensor, v: Tensor) -> Triple:
    """Twice the heads of half the width for q and k, (B, 2h, N, e); v (B, h, N, 2e)."""
    q = rearrange(q, "b n (h e) -> b h n e", h=2 * module.num_heads)
    k = rearrange(k, "b n (h e) -> b h n e", h=2 * module.num_heads)
    return module.q_norm(q), module.k_norm(k), rearrange(v, "b n (h e) -> b h n e", h=module.num_heads)


def _attend_difference(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(softmax_1 - lambda softmax_2) v, normalised per head; the second head of each pair is subtracted."""
    weight = module._compute_lambda().type_as(q)
    first, second = (slice(0, None, 2), slice(1, None, 2))
    if module.fused_attn:
        drop = module.attn_drop_p if module.training else 0.0
        one, two = (
            F.scaled_dot_product_attention(q[:, part], k[:, part], v, attn_mask=mask, dropout_p=drop)
            for part in (first, second)
        )
        out = one - weight * two
    else:
        attention = module.attn_drop(weights(q, k, mask))
        out = (attention[:, first] - weight * attention[:, second]) @ v
    normed: Tensor = module.sub_norm(out) * (1 - module.lambda_init)
    return normed


def _add_parallel(module: Any, x: Tensor, attended: Tensor, hidden: Tensor) -> Tensor:
    """The residual sum of a parallel block: attention (B, N, d) and MLP hidden (B, N, 4d) through the output."""
    if module.mlp_bias is not None:
        hidden = hidden + module.mlp_bias
    hidden = module.mlp_drop(module.mlp_act(hidden))
    if module.out_proj is not None:
        y = module.out_proj(torch.cat((attended, hidden), dim=-1))
    else:
        y = module.attn_out_proj(attended) + module.mlp_out_proj(hidden)
    return x + module.drop_path(module.ls(y))


PROMPTED: dict[type, type[Prompted]] = {
    cls.original: cls
    for cls in (
        PromptedAttention,
        PromptedDiffAttention,
        PromptedBlock,
        PromptedResPostBlock,
        PromptedParallelThingsBlock,
        PromptedParallelScalingBlock,
        PromptedDiffParallelScalingBlock,
    )
}
