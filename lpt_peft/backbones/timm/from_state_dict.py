"""Building a plain timm VisionTransformer from its state dict; the shapes give the sizes.

Names of tensors are timm's since 0.5. Not here: pretrained models by name (`lpt_peft/backbones/loading.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lpt_peft.errors import BackboneError

_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
_HEADS = ("head.", "head_dist.", "pre_logits.")


def vit_from_weights(tensors: Mapping[str, Tensor], *, norm_eps: float, num_heads: int | None = None) -> Any:
    """Build the ViT that has these tensors, in eval mode, without a classifier.

    Args:
        tensors: Its state dict, float32; classifiers are left out.
        norm_eps: eps of every LayerNorm, which the tensors do not show.
        num_heads: Heads of the attention, which the tensors do not show; None is the width divided by 64.

    Raises:
        BackboneError: The tensors are not those of a plain ViT with a class token.
    """
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEADS)}
    try:
        width, channels, patch, _ = state["patch_embed.proj.weight"].shape
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        blocks = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    except (KeyError, ValueError, IndexError) as error:
        raise BackboneError(f"These are not the tensors of a plain ViT with a class token: {error!r:.200}.") from error
    if blocks != set(range(len(blocks))):
        raise BackboneError(f"These are not the tensors of a plain ViT: its blocks are {sorted(blocks)[:20]}.")
    # Before building: inconsistent sizes could need any amount of memory.
    expected: dict[str, tuple[int, ...]] = {"pos_embed": (1, side * side + 1, width)}
    for block in blocks:
        expected[f"blocks.{block}.attn.qkv.weight"] = (3 * width, width)
        expected[f"blocks.{block}.mlp.fc1.weight"] = (hidden, width)
    for name, shape in expected.items():
        if min(shape) < 1 or name not in state or tuple(state[name].shape) != shape:
            found = tuple(state[name].shape) if name in state else "missing"
            raise BackboneError(f"These are not the tensors of a plain ViT: {name} is {found}, not {shape}.")
    if min(patch, channels) < 1:
        raise BackboneError(f"These are not the tensors of a plain ViT: patches of {patch} px, {channels} channels.")
    heads = num_heads or width // 64
    if heads < 1 or width % heads:
        raise BackboneError(f"The number of heads does not follow from the width {width}: give num_heads=.")
    vit = VisionTransformer(
        img_size=side * patch,
        patch_size=patch,
        in_chans=channels,
        num_classes=0,
        embed_dim=width,
        depth=len(blocks),
        num_heads=heads,
        mlp_ratio=hidden / width,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        norm_layer=partial(nn.LayerNorm, eps=norm_eps),
    )
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        raise BackboneError(f"The tensors do not fit a plain ViT of these sizes: {error!s:.400}") from error
    return vit.eval()


def architecture_of(vit: Any) -> str:
    """Return timm's name for a plain ViT of these sizes, or the class name."""
    (side, _), (patch, _) = vit.patch_embed.img_size, vit.patch_embed.patch_size
    name = f"vit_{_WIDTHS.get(vit.embed_dim, 'unnamed')}_patch{patch}_{side}"
    return name if name in timm.list_models() else type(vit).__name__
