"""Arguments that make timm's plain ViTs narrow without changing their structure."""

from __future__ import annotations

from typing import Any

import timm
from timm.models.vitamin import VitCfg, VitConvCfg

WIDTH, HEADS = 32, 2
FIXED_WIDTH = ("vit_base_mci_224",)  # its convolutional stem has no options
VITAMIN_STEM = VitCfg(
    embed_dim=(16, 24, WIDTH),
    depths=(1, 1, 1),
    stem_width=16,
    conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
    head_type="1d",
)


def module_of(name: str) -> str:
    """The module of timm that defines a model: "eva", "vitamin"."""
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def small_options(name: str) -> dict[str, Any]:
    """Arguments of `create_model`; test_timm_all.py checks that the structure stays as it is."""
    if name in FIXED_WIDTH:
        return {}
    options: dict[str, Any] = {"embed_dim": WIDTH, "num_heads": HEADS}
    if module_of(name) == "vitamin":
        options["embed_cfg"] = VITAMIN_STEM
    if name.startswith(("deepseek", "qwen3")) and name.endswith(("_enc", "_align", "_merge")):
        options["out_features"] = 2 * WIDTH  # of the projector
    return options
