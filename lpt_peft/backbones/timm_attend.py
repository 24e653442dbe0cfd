"""The arithmetic that timm's attentions share: packed projections, rotation, softmax over keys.

Not here: which class does what (`timm_blocks.py`, `timm_rotary.py`, `timm_bias.py`).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import apply_rot_embed_cat
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T + mask) v on heads (B, h, N, e), fused or step by step as the module is set.

    `scale` None is `1 / sqrt(e)`, every timm attention's default.
    """
    if module.fused_attn:
        drop = module.attn_drop.p if module.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)
    return module.attn_drop(weights(q, k, mask, scale)) @ v


def weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T + mask), (B, h, N, keys)."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)


def project_packed(module: Any, x: Tensor) -> Triple:
    """q, k, v (B, h, N, e) of one packed projection whose bias has a part for q and v alone (Beit, Eva)."""
    if module.q_bias is None:
        packed = module.qkv(x)
    else:
        bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
        if module.qkv_bias_separate:
            packed = module.qkv(x) + bias
        else:
            _warn_of_ignored_lora(module)
            packed = F.linear(x, module.qkv.weight, bias)
    q, k, v = rearrange(packed, "b n (three h e) -> three b h n e", three=3, h=module.num_heads)
    # q alone must not keep the packed buffer alive: k and v are copied by the concatenation.
    return q.contiguous(), k, v


def rotate(module: Any, heads: Tensor, rope: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rotary embedding of (B, h, N, e), prefix tokens left as they are; prompts never come here.

    A rotary table is float32 under a 16-bit backbone: what was rotated goes back to `dtype`.
    """
    if rope is None:
        return heads
    prefix, patches = heads[:, :, : module.num_prefix_tokens], heads[:, :, module.num_prefix_tokens :]
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=module.rotate_half)], dim=2).to(dtype)


def _warn_of_ignored_lora(module: Any) -> None:
    if hasattr(module.qkv, "base_layer"):
        warnings.warn(
            f"timm's {type(module).original.__name__} reads qkv.weight directly, so LoRA on `qkv` has no effect, with "
            "or without prompts. Merge it (merge_and_unload()) or put LoRA on `proj`, `fc1` and `fc2`.",
            UserWarning,
            stacklevel=2,
        )
