"""Small models of every ecosystem, and an adapter on each: the rows of the table in docs/backbones.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import open_clip
import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from lpt_peft import LongTailPromptAdapter
from tests.versions import skip_unless

SIDE, DEPTH = 32, 2


@dataclass(frozen=True)
class Row:
    """A row of the table: how to build the model, the modules for LoRA, the switch of checkpointing if it has any."""

    make: Callable[[], nn.Module]
    lora: list[str] | str = field(default_factory=lambda: ["qkv"])
    checkpointing: Callable[[Any], None] | None = lambda model: model.set_grad_checkpointing()


def timm_model(name: str, **options: Any) -> nn.Module:
    skip_unless(name in timm.list_models(), name)
    return timm.create_model(name, **{"img_size": SIDE, "patch_size": 8, "depth": DEPTH, "num_classes": 7, **options})


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A model on the meta device; on the CPU if its constructor reads values (timm before 1.0.21)."""
    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError):
        return make()


def torchvision_model() -> nn.Module:
    return torchvision.models.VisionTransformer(SIDE, 8, DEPTH, 3, 48, 96, num_classes=7)


def transformers_model(name: str, part: str = "Model", **options: Any) -> nn.Module:
    skip_unless(hasattr(transformers, f"{name}Config"), name, transformers)
    sizes = {"hidden_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 3, "intermediate_size": 96}
    config = getattr(transformers, f"{name}Config")(**sizes, image_size=SIDE, patch_size=8, num_labels=7, **options)
    return getattr(transformers, f"{name}{part}")(config)


def recompute(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def open_clip_model(**vision: Any) -> nn.Module:
    """A complete CLIP, with its text tower."""
    text = {"context_length": 8, "vocab_size": 32, "width": 48, "heads": 3, "layers": 1}
    vision = {"image_size": SIDE, "patch_size": 8, "layers": DEPTH, "width": 48, "head_width": 16, **vision}
    return open_clip.CLIP(embed_dim=20, vision_cfg=vision, text_cfg=text)


def timm_tower() -> nn.Module:
    """A complete CLIP whose visual tower is timm's smallest ViT."""
    model = open_clip_model(
        timm_model_name="test_vit", timm_model_pretrained=False, timm_pool="token", timm_proj="linear"
    )
    model.visual.trunk.set_input_size((SIDE, SIDE))
    return model


SMALL = {"embed_dim": 48, "num_heads": 3}
ROWS: dict[str, Row] = {
    "timm ViT": Row(lambda: timm_model("vit_tiny_patch16_224", **SMALL)),
    "timm EVA-02": Row(lambda: timm_model("eva02_tiny_patch14_224", **SMALL), lora=["proj", "fc2"]),
    "timm BEiT": Row(lambda: timm_model("beit_base_patch16_224", **SMALL), lora=["proj", "fc1"]),
    "timm NaFlexViT": Row(lambda: timm_model("naflexvit_base_patch16_gap", **SMALL, img_size=None)),
    "transformers ViT classifier": Row(
        lambda: transformers_model("ViT", "ForImageClassification"), ["q_proj", "v_proj"], recompute
    ),
    "transformers DINOv3": Row(
        lambda: transformers_model("DINOv3ViT", pos_embed_rescale=None), ["q_proj", "v_proj"], recompute
    ),
    "transformers SigLIP": Row(lambda: transformers_model("SiglipVision"), ["q_proj", "v_proj"], recompute),
    "torchvision": Row(torchvision_model, lora=["mlp.0", "mlp.3"], checkpointing=None),
    "open_clip": Row(open_clip_model, lora=r"visual\..*c_fc"),
    "open_clip, timm tower": Row(timm_tower, checkpointing=lambda model: model.visual.set_grad_checkpointing()),
}


def make(row: str) -> nn.Module:
    """The row's model in eval mode, without zero weights; the same weights in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = ROWS[row].make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def wrap(model: nn.Module, phase: str = "shared") -> LongTailPromptAdapter:
    """An adapter with prompts that differ strongly, the same in every call; "block_k" is phase "group" in one pass."""
    query: Any = "block_k" if phase == "block_k" else "final"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        adapter = LongTailPromptAdapter.wrap(model, 5, prompt_length=3, pool_size=4, query=query, head_dropout=0.0)
        with torch.no_grad():
            for parameter in (adapter.shared.prompts, adapter.pool.prompts, adapter.pool.keys):
                parameter.mul_(20)
    adapter.phase = "shared" if phase == "shared" else "group"
    return adapter


def build(row: str, phase: str = "shared") -> LongTailPromptAdapter:
    """The row's adapter, in eval mode."""
    return wrap(make(row), phase)


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


rows = pytest.mark.parametrize("row", ROWS)
PHASES = ("shared", "group", "block_k")
phases = pytest.mark.parametrize("phase", PHASES)
# Phase "group" contains the pass of phase "shared", so that phase alone is nightly where a test compiles.
compiled_phases = pytest.mark.parametrize(
    "phase", [pytest.param("shared", marks=pytest.mark.nightly), "group", "block_k"]
)
