"""The bundled backbone: a ViT of 1.2 million parameters trained on printed characters without digits.

`examples/pretrain_glyphs.py` made it; `glyph_vit.json` records how.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from safetensors.torch import load
from timm.models.vision_transformer import VisionTransformer

from lpt_peft.backbones.bundled import NAME, TAG


@cache
def glyph_config() -> dict[str, Any]:
    """Return the content of `glyph_vit.json`: model_args, preprocess, pretraining."""
    config: dict[str, Any] = json.loads(_file(f"{NAME}.json").decode())
    return config


def glyph_vit() -> VisionTransformer:
    """Return a new copy of the backbone, without a head, in eval mode.

    A timm VisionTransformer: 32 px, patch 4, width 128, 6 blocks, 4 heads; inputs (B, 3, 32, 32)
    normalized by mean 0.5 and std 0.5.

    Example:
        >>> vit = glyph_vit()
        >>> vit.embed_dim, len(vit.blocks), vit.num_classes
        (128, 6, 0)
    """
    config = glyph_config()
    vit = VisionTransformer(**config["model_args"], num_classes=0, weight_init="skip")
    vit.load_state_dict(load(_file(f"{NAME}.safetensors")))
    vit.pretrained_cfg = {"architecture": NAME, "tag": TAG, **config["preprocess"]}
    vit._model_args = dict(config["model_args"])
    return vit.eval()


def _file(name: str) -> bytes:
    return resources.files("lpt_peft.backbones.bundled").joinpath(name).read_bytes()
