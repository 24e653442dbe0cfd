"""timm's blocks with a relative-position bias, with prompt keys and values: BEiT and the relpos ViTs.

A prompt has no position, so its columns of the bias are 0. Each subclass has the forward of its original
with one more argument, as in `timm_blocks.py`.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from torch import Tensor

from lpt_peft.attention import Prompted, append, extend_mask
from lpt_peft.backbones.timm_attend import Triple, attend, project_packed


class PromptedBeitAttention(Prompted, BeitAttention):
    """Attention with a bias of its own, one shared by all blocks, or both."""

    original = BeitAttention

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return BeitAttention.forward(self, x, shared_rel_pos_bias=shared_rel_pos_bias)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return _biased_attention(self, x, prompt, bias)

    def project(self, x: Tensor) -> Triple:
        """q, k and v (B, h, N, e)."""
        return project_packed(self, x)


class PromptedBeitBlock(Prompted, BeitBlock):
    """Pre-norm block of BEiT."""

    original = BeitBlock

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return BeitBlock.forward(self, x, shared_rel_pos_bias=shared_rel_pos_bias)
        attended = self.attn(self.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias, prompt=self.norm1(prompt))
        x = x + self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)
        hidden = self.mlp(self.norm2(x))
        return x + self.drop_path2(hidden if self.gamma_2 is None else self.gamma_2 * hidden)

    def without_positions(self, count: int) -> dict[str, Any]:
        """No bias of its own, none shared."""
        self.attn.relative_position_bias_table = None
        return {}


class PromptedRelPosAttention(Prompted, RelPosAttention):
    """Attention with a bias of its own, or the shared one."""

    original = RelPosAttention

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return RelPosAttention.forward(self, x, shared_rel_pos=shared_rel_pos)
        return _biased_attention(self, x, prompt, shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias())

    def project(self, x: Tensor) -> Triple:
        """Normed q, k and v (B, h, N, e)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads)
        return self.q_norm(q.contiguous()), self.k_norm(k), v


class PromptedRelPosBlock(Prompted, RelPosBlock):
    """Pre-norm block."""

    original = RelPosBlock

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return RelPosBlock.forward(self, x, shared_rel_pos=shared_rel_pos)
        attended = self.attn(self.norm1(x), shared_rel_pos=shared_rel_pos, prompt=self.norm1(prompt))
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def without_positions(self, count: int) -> dict[str, Any]:
        """No bias of its own, none shared."""
        self.attn.rel_pos = None
        return {}


class PromptedResPostRelPosBlock(Prompted, ResPostRelPosBlock):
    """Post-norm block: attention sees tokens and prompts as they are."""

    original = ResPostRelPosBlock

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        if prompt is None:
            return ResPostRelPosBlock.forward(self, x, shared_rel_pos=shared_rel_pos)
        attended = self.attn(x, shared_rel_pos=shared_rel_pos, prompt=prompt)
        x = x + self.drop_path1(self.norm1(attended))
        return x + self.drop_path2(self.norm2(self.mlp(x)))

    def without_positions(self, count: int) -> dict[str, Any]:
        """No bias of its own, none shared."""
        self.attn.rel_pos = None
        return {}


def _biased_attention(module: Any, x: Tensor, prompt: Tensor, bias: Tensor | None) -> Tensor:
    """What both families do alike: tokens (B, N, d), prompt (1 or B, n, d), bias (1, h, N, N) to (B, N, d)."""
    q, k, v = module.project(x)
    _, k_prompt, v_prompt = module.project(prompt)
    mask = extend_mask(bias, False, x, prompt.shape[-2])
    out = attend(module, q, append(k, k_prompt), append(v, v_prompt), mask)
    return module.proj_drop(module.proj(rearrange(out, "b h n e -> b n (h e)")))


PROMPTED: dict[type, type[Prompted]] = {
    cls.original: cls
    for cls in (
        PromptedBeitAttention,
        PromptedBeitBlock,
        PromptedRelPosAttention,
        PromptedRelPosBlock,
        PromptedResPostRelPosBlock,
    )
}
