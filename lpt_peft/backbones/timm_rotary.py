"""timm's rotary blocks with prompt keys and values: Eva, DeepSeek and Gemma 4; prompts take no rotation.

Each subclass has the forward of its original with one more argument, as in `timm_blocks.py`. Not here:
where the rotary embedding comes from (`timm_families.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from timm.layers import AttentionRope
from timm.models.deepseek_vit import DeepseekVitBlock
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.gemma4_vit import Gemma4Attention, Gemma4Block, apply_multidimensional_rope
from torch import Tensor

from lpt_peft.attention import Prompted, append, extend_mask
from lpt_peft.backbones.timm_attend import Triple, attend, project_packed, rotate


class PromptedEvaAttention(Prompted, EvaAttention):
    """Rotary attention without a bias for keys, fused or separate projections."""

    original = EvaAttention

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        prompt: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return EvaAttention.forward(self, x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return _rotary_attention(self, x, prompt, rope, extend_mask(attn_mask, is_causal, x, prompt.shape[-2]))

    def project(self, x: Tensor) -> Triple:
        """Normed q, k and v (B, h, N, e)."""
        q, k, v = _project_apart(self, x) if self.qkv is None else project_packed(self, x)
        return self.q_norm(q), self.k_norm(k), v


class PromptedAttentionRope(Prompted, AttentionRope):
    """Rotary attention, also with fewer heads of keys and values than of queries."""

    original = AttentionRope

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        prompt: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return AttentionRope.forward(self, x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return _rotary_attention(self, x, prompt, rope, extend_mask(attn_mask, is_causal, x, prompt.shape[-2]))

    def project(self, x: Tensor) -> Triple:
        """Normed q (B, h, N, e), k and v (B, h of keys, N, e)."""
        if self.qkv is None:
            q, k, v = _project_apart(self, x)
        else:
            q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads)
            q = q.contiguous()  # as in project_packed
        return self.q_norm(q), self.k_norm(k), v


class PromptedEvaBlock(Prompted, EvaBlock):
    """Pre-norm block of the Eva family, DINOv3, Perception Encoder, Qwen 3 and others."""

    original = EvaBlock

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        prompt: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return EvaBlock.forward(self, x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        prompt = self.norm1(prompt)
        attended = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal, prompt=prompt)
        x = x + self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)
        hidden = self.mlp(self.norm2(x))
        return x + self.drop_path2(hidden if self.gamma_2 is None else self.gamma_2 * hidden)


class PromptedEvaBlockPostNorm(Prompted, EvaBlockPostNorm):
    """Post-norm block of the Eva family: attention sees tokens and prompts as they are."""

    original = EvaBlockPostNorm

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        prompt: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return EvaBlockPostNorm.forward(self, x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        attended = self.attn(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal, prompt=prompt)
        x = x + self.drop_path1(self.norm1(attended))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class PromptedDeepseekVitBlock(Prompted, DeepseekVitBlock):
    """Pre-norm block whose norms run in float32."""

    original = DeepseekVitBlock

    def forward(self, x: Tensor, rope: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return DeepseekVitBlock.forward(self, x, rope=rope)
        x = x + self.drop_path1(self.attn(self.norm1(x), rope=rope, prompt=self.norm1(prompt)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class PromptedGemma4Attention(Prompted, Gemma4Attention):
    """Norms on q, k and v, rotation in two dimensions, scores without a scale."""

    original = Gemma4Attention

    def forward(
        self,
        x: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        attn_mask: Tensor | None = None,
        prompt: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return Gemma4Attention.forward(self, x, rope_cos, rope_sin, attn_mask=attn_mask)
        q, k, v = self._project(x)
        _, k_prompt, v_prompt = self._project(prompt)
        q, k = (
            apply_multidimensional_rope(heads, rope_cos, rope_sin, ndim=2, unsqueeze_dim=2).transpose(1, 2)
            for heads in (q, k)
        )
        k, v = append(k, k_prompt.transpose(1, 2)), append(v.transpose(1, 2), v_prompt.transpose(1, 2))
        mask = extend_mask(attn_mask, False, x, prompt.shape[-2])
        out = attend(self, q, *_share_heads(self, k, v), mask, scale=1.0)
        return self.proj_drop(self.o_proj(rearrange(out, "b h n e -> b n (h e)")))

    def _project(self, x: Tensor) -> Triple:
        """Normed q (B, N, h, e), k and v (B, N, h of keys, e)."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.q_norm(q), self.k_norm(k), self.v_norm(v)


class PromptedGemma4Block(Prompted, Gemma4Block):
    """Norms before and after attention and MLP."""

    original = Gemma4Block

    def forward(
        self,
        x: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        attn_mask: Tensor | None = None,
        prompt: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return Gemma4Block.forward(self, x, rope_cos, rope_sin, attn_mask=attn_mask)
        attended = self.attn(self.norm1(x), rope_cos, rope_sin, attn_mask=attn_mask, prompt=self.norm1(prompt))
        x = x + self.drop_path(self.norm2(attended))
        return x + self.drop_path(self.norm4(self.mlp(self.norm3(x))))

    def without_positions(self, count: int) -> dict[str, Any]:
        """The rotation by no angle; clamps off, whose bounds are buffers, unknown on the meta device."""
        for part in self.modules():
            if hasattr(part, "use_clipped"):
                part.use_clipped = False
        table = torch.ones(1, count, self.attn.head_dim, dtype=self.norm1.weight.dtype, device=self.norm1.weight.device)
        return {"rope_cos": table, "rope_sin": torch.zeros_like(table)}


def _rotary_attention(module: Any, x: Tensor, prompt: Tensor, rope: Tensor | None, mask: Tensor | None) -> Tensor:
    """What EvaAttention and AttentionRope do alike: tokens (B, N, d), normed prompt (1 or B, n, d) to (B, N, d)."""
    q, k, v = module.project(x)
    _, k_prompt, v_prompt = module.project(prompt)
    q, k = rotate(module, q, rope, v.dtype), rotate(module, k, rope, v.dtype)
    k, v = _share_heads(module, append(k, k_prompt.type_as(k)), append(v, v_prompt))
    out = module.norm(rearrange(attend(module, q, k, v, mask), "b h n e -> b n (h e)"))
    if module.gate is not None:
        out = out * module.gate(x).sigmoid()
    return module.proj_drop(module.proj(out))


def _project_apart(module: Any, x: Tensor) -> Triple:
    q, k, v = (layer(x).unflatten(-1, (-1, module.head_dim)) for layer in (module.q_proj, module.k_proj, module.v_proj))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _share_heads(module: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Heads of keys and values repeated to the number of query heads (grouped-query attention)."""
    groups = getattr(module, "num_kv_groups", 1)
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


PROMPTED: dict[type, type[Prompted]] = {
    cls.original: cls
    for cls in (
        PromptedEvaAttention,
        PromptedAttentionRope,
        PromptedEvaBlock,
        PromptedEvaBlockPostNorm,
        PromptedDeepseekVitBlock,
        PromptedGemma4Attention,
        PromptedGemma4Block,
    )
}
