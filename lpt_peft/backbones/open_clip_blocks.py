"""open_clip's transformer blocks with prompt keys and values: one subclass per class of `transformer.py`.

Without a prompt each runs the original forward, bit for bit. With one (1 or B, n, d), given to a block before
its norm and to an attention after it, attention also reads the prompt's keys and values. Masks belong to text
towers: a block with a prompt takes none. Not here: how classes are swapped (`lpt_peft.attention`) and the
whole tower (`open_clip_vit.py`).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    LayerNorm,
    LayerNormFp32,
    ResidualAttentionBlock,
)
from torch import Tensor, nn

from lpt_peft.attention import Prompted, append
from lpt_peft.backbones.multihead import attend


class _PromptedBlock(Prompted):
    def without_positions(self: Any, count: int) -> dict[str, Any]:
        """Nothing here knows positions; but the check runs in float64, and batch first, which the copy must stand."""
        for module in self.modules():
            if isinstance(module, LayerNormFp32):
                module.__class__ = LayerNorm
            elif isinstance(module, nn.MultiheadAttention):
                module.batch_first = True
        return {}


class PromptedResidualAttentionBlock(_PromptedBlock, ResidualAttentionBlock):
    """Pre-norm block around nn.MultiheadAttention."""

    original = ResidualAttentionBlock

    def forward(self, x: Tensor, *args: Any, prompt: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Tokens to tokens; with a prompt (1 or B, n, d) they are (B, N, d) also where the transformer is not."""
        if prompt is None:
            return ResidualAttentionBlock.forward(self, x, *args, **kwargs)
        x = x + self.ls_1(attend(self.attn, self.ln_1(x), self.ln_1(prompt)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class PromptedCustomResidualAttentionBlock(_PromptedBlock, CustomResidualAttentionBlock):
    """Pre-norm block around open_clip's own attention, with a norm behind it where the model has one."""

    original = CustomResidualAttentionBlock

    def forward(self, x: Tensor, *args: Any, prompt: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Tokens (B, N, d) to (B, N, d); prompt (1 or B, n, d)."""
        if prompt is None:
            return CustomResidualAttentionBlock.forward(self, x, *args, **kwargs)
        x = x + self.ls_1(self.ln_attn(self.attn(self.ln_1(x), prompt=self.ln_1(prompt))))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class PromptedAttention(Prompted, Attention):
    """Multi-head attention with qk-norm or cosines, head scales and inner norm where the model has them."""

    original = Attention

    def forward(self, x: Tensor, *args: Any, prompt: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Tokens (B, N, d) to (B, N, d); prompt (1 or B, n, d)."""
        if prompt is None:
            return Attention.forward(self, x, *args, **kwargs)
        q, k, v = self._project(x)
        _, k_prompt, v_prompt = self._project(prompt)
        # q alone must not keep the packed buffer alive: k and v are copied by the concatenation.
        q, k, v, scale = q.contiguous(), append(k, k_prompt), append(v, v_prompt), None
        if self.logit_scale is not None:
            q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=self.logit_scale_max).exp()
            k, scale = F.normalize(k, dim=-1), 1.0
        else:
            q, k = self.ln_q(q), self.ln_k(k)
        drop = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=scale)
        if self.head_scale is not None:
            out = out * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(rearrange(out, "b h n e -> b n (h e)"))))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(packed, "b n (three h e) -> three b h n e", three=3, h=self.num_heads)
        return q, k, v


PROMPTED: dict[type, type[Prompted]] = {
    cls.original: cls
    for cls in (PromptedResidualAttentionBlock, PromptedCustomResidualAttentionBlock, PromptedAttention)
}


def prompt_sites(block: Any) -> list[nn.Module]:
    """The modules of a block that must change class: itself, and an attention of open_clip's own."""
    custom = isinstance(block, CustomResidualAttentionBlock)
    return [block, block.attn] if custom else [block]
