"""Tiny vision encoders of transformers with random weights, their inputs and their features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.idefics2 import configuration_idefics2, modeling_idefics2
from transformers.models.kosmos2 import configuration_kosmos2, modeling_kosmos2

from tests.versions import skip_unless

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
VIDEO = {"num_frames": 4}


def cls(out: Any) -> Tensor:
    return out.last_hidden_state[:, 0]


def mean(out: Any) -> Tensor:
    return out.last_hidden_state.mean(1)


def pooled(out: Any) -> Tensor:
    return out.pooler_output


def summary(out: Any) -> Tensor:
    return out.summary


# Name of the classes before Model and Config -> (feature, config settings beyond SIZES); "name: case" for variants.
ENCODERS: dict[str, tuple[Callable[[Any], Tensor], dict[str, Any]]] = {
    "ViT": (cls, {}),
    "DeiT": (cls, {}),
    "ViTMAE": (cls, {}),
    "ViTMSN": (cls, {}),
    "Dinov2": (cls, {}),
    "Dinov2: SwiGLU": (cls, {"use_swiglu_ffn": True}),
    "Dinov2WithRegisters": (cls, {}),
    "DINOv3ViT": (cls, {"num_register_tokens": 2}),
    "DINOv3ViT: gated": (cls, {"num_register_tokens": 2, "use_gated_mlp": True}),
    "Sapiens2": (cls, {}),
    "Sapiens2: grouped": (cls, {"num_key_value_heads_per_layer": [2, 1]}),
    "Tipsv2Vision": (cls, {}),
    "InternVLVision": (cls, {"image_size": [32, 32], "patch_size": [8, 8], "use_qk_norm": True}),
    "Vivit": (cls, {**VIDEO, "tubelet_size": [2, 8, 8]}),
    "Yolos": (cls, {"image_size": [32, 32], "num_detection_tokens": 3, "use_mid_position_embeddings": False}),
    "DPT": (cls, {"backbone_out_indices": [0, 1, 1, 1]}),
    "GitVision": (cls, {}),
    "Beit: shared bias": (cls, {"use_shared_relative_position_bias": True, "use_mean_pooling": False}),
    "Beit": (pooled, {"use_relative_position_bias": True}),
    "CLIPVision": (pooled, {}),
    "CLIPSegVision": (pooled, {}),
    "ChineseCLIPVision": (pooled, {}),
    "AltCLIPVision": (pooled, {}),
    "MetaClip2Vision": (pooled, {}),
    "SiglipVision": (pooled, {}),
    "Siglip2Vision": (pooled, {"num_patches": 16}),
    "BlipVision": (pooled, {}),
    "Blip2Vision": (pooled, {}),
    "InstructBlipVision": (pooled, {}),
    "InstructBlipVideoVision": (pooled, {}),
    "Aimv2Vision": (pooled, {}),
    "Pixio": (pooled, {}),
    "MLCDVision": (pooled, {}),
    "OwlViTVision": (pooled, {}),
    "Owlv2Vision": (pooled, {}),
    "Kosmos2Vision": (pooled, {}),
    "Radio": (summary, {}),
    "VideoMAE": (mean, VIDEO),
    "IJepa": (mean, {}),
    "JanusVision": (mean, {}),
    "SiglipVision: no head": (mean, {"vision_use_head": False}),
    "Idefics2Vision": (mean, {}),
    "Idefics3Vision": (mean, {}),
    "SmolVLMVision": (mean, {}),
}
_ELSEWHERE = {  # not among the package's own names
    "Idefics2Vision": (modeling_idefics2.Idefics2VisionTransformer, configuration_idefics2.Idefics2VisionConfig),
    "Kosmos2Vision": (modeling_kosmos2.Kosmos2VisionModel, configuration_kosmos2.Kosmos2VisionConfig),
}


def randomise(model: nn.Module) -> Any:
    """Large random weights, also of biases and relative positions; float64, eval mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            width = parameter.shape[-1] if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)
    return model.double().eval()


def encoder(name: str, **settings: Any) -> Any:
    """The encoder of ENCODERS; `settings` go to its config."""
    family = name.partition(":")[0]
    if family in _ELSEWHERE:
        model, config = _ELSEWHERE[family]
    else:
        skip_unless(hasattr(hf, f"{family}Config"), family, hf)
        model = getattr(hf, f"{family}Model", None) or getattr(hf, f"{family}Transformer")
        config = getattr(hf, f"{family}Config")
    with torch.random.fork_rng(devices=[]):
        built = model(config(**{**SIZES, **ENCODERS[name][1], **settings}))
    return randomise(built)


def build(make: Callable[[], nn.Module]) -> Any:
    """Any other model, with random weights."""
    with torch.random.fork_rng(devices=[]):
        built = make()
    return randomise(built)


def inputs(name: str, batch: int = 2) -> dict[str, Tensor]:
    """Random images (or videos, patches) in float64, with the masks that the encoder needs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    if name in ("VideoMAE", "Vivit"):
        return {"pixel_values": draw(4, 3, 32, 32)}
    if name == "ViTMAE":  # the order of its shuffled patches
        return {"pixel_values": draw(3, 32, 32), "noise": draw(16)}
    if name == "Siglip2Vision":
        mask = torch.ones(batch, 16, dtype=torch.int64)
        mask[0, 12:] = 0  # the first image is smaller: the mask keeps its padding out
        shapes = torch.tensor([[3, 4], *[[4, 4]] * (batch - 1)])
        return {"pixel_values": draw(16, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if name in ("Idefics2Vision", "Idefics3Vision", "SmolVLMVision"):
        mask = torch.ones(batch, 4, 4, dtype=torch.bool)
        mask[0, 3] = False
        return {"pixel_values": draw(3, 32, 32), "patch_attention_mask": mask}
    return {"pixel_values": draw(3, 32, 32)}
