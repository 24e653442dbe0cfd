"""Banks on models of every ecosystem: prompts of unequal length, and an error where attention takes no mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn

from lpt_peft import LongTailPromptAdapter, PromptBank
from lpt_peft.errors import BackboneError
from tests.backbones.models import DEPTH, ROWS, SIDE, make
from tests.backbones.transformers_zoo import encoder, inputs
from tests.bank.tasks import deviation, fill, make_adapter, save
from tests.conftest import tiny_vit

EQUAL: dict[str, dict[str, Any]] = {
    "shared": {"phase": "shared", "pool_size": 3, "num_classes": 2},
    "final": {"pool_size": 4, "top_k": 3, "num_classes": 6},
    "block_k": {"pool_size": 2, "query": "block_k"},
}
ALL: dict[str, dict[str, Any]] = {**EQUAL, "short": {"prompt_length": 1}, "first": {"shared_layers": 0}}
# Some norms and rotary tables compute in float32 whatever their input.
FLOAT32_INSIDE = {"timm EVA-02", "transformers DINOv3"}


def bank_of(model: nn.Module, folder: Path, kinds: dict[str, Any]) -> tuple[PromptBank, dict[str, Any]]:
    """A bank with tasks of different kinds, and their adapters."""
    adapters = {}
    for number, (kind, options) in enumerate(kinds.items()):
        sizes = {"prompt_length": 3, "shared_layers": 1, "top_k": 2, "query": "final", **options}
        adapters[kind] = make_adapter(model, number, **sizes)
        save(adapters[kind], folder / kind)
    return fill(PromptBank(model), folder, list(adapters)), adapters


def images_of(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def in_float64(bank: PromptBank, adapters: dict[str, LongTailPromptAdapter]) -> None:
    for model in (bank.vit, *adapters.values()):
        model.double()


@pytest.mark.parametrize("row", ROWS)
def test_tasks_of_equal_length(row: str, tmp_path: Path) -> None:
    bank, adapters = bank_of(make(row), tmp_path, EQUAL)
    in_float64(bank, adapters)
    images = images_of(6)
    tolerance = 1e-5 if row in FLOAT32_INSIDE else 1e-12
    assert deviation(bank(images, [*EQUAL] * 2), images, adapters, None) < tolerance
    for kind in EQUAL:
        assert deviation(bank(images[:2], kind), images[:2], adapters, None) < tolerance
    output = bank(images, None)
    bank.unwrap()
    assert deviation(output, images, adapters, bank.backbone.plain_feature) < tolerance


@pytest.mark.parametrize("row", ROWS)
def test_tasks_of_unequal_length(row: str, tmp_path: Path) -> None:
    bank, adapters = bank_of(make(row), tmp_path, ALL)
    in_float64(bank, adapters)
    images = images_of(2 * len(ALL) + 1)
    tolerance = 1e-5 if row in FLOAT32_INSIDE else 1e-12
    output = bank(images, [*ALL, None, *ALL])
    assert deviation(output, images, adapters, bank.backbone.plain_feature) < tolerance


ENCODERS = ["DeiT", "Dinov2", "CLIPVision", "SiglipVision", "Beit", "Vivit"]
NO_MASKS = ["Yolos", "DPT", "BlipVision", "VideoMAE"]
"""Encoders of transformers whose attention takes no mask."""


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_transformers(name: str, tmp_path: Path) -> None:
    bank, adapters = bank_of(encoder(name).float(), tmp_path, ALL)
    in_float64(bank, adapters)
    (images,) = inputs(name, len(adapters)).values()
    assert deviation(bank(images, list(adapters)), images, adapters, None) < 1e-12


class Unmasked(Attention):
    """Attention of timm that ignores masks."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        out: Tensor = super().forward(x)
        return out


def ignoring() -> nn.Module:
    vit = tiny_vit()
    for block in vit.blocks:
        block.attn.__class__ = Unmasked
    return vit


def relative_positions() -> nn.Module:
    sizes = {"img_size": SIDE, "patch_size": 8, "depth": DEPTH, "embed_dim": 48, "num_heads": 3}
    vit: nn.Module = timm.create_model("vit_relpos_small_patch16_224", **sizes)
    return vit.eval()


MODELS = {"ignoring": ignoring, "relative positions": relative_positions}


@pytest.mark.parametrize("name", [*NO_MASKS, *MODELS])
def test_unequal_tasks_are_refused_without_masks(name: str, tmp_path: Path) -> None:
    model = MODELS[name]() if name in MODELS else encoder(name).float()
    bank, adapters = bank_of(model, tmp_path, ALL)
    in_float64(bank, adapters)
    images = images_of(2) if name in MODELS else inputs(name)["pixel_values"]
    reason = "ignores the mask" if name == "ignoring" else "takes no mask"
    for tasks in (["short", "final"], ["first", "final"], ["final", None]):
        for _ in range(2):
            with pytest.raises(BackboneError, match=f"cannot be mixed on this.*{reason}.*Use a batch for each"):
                bank(images, tasks)
    for kind in adapters:
        assert deviation(bank(images, kind), images, adapters, None) < 1e-12
    assert deviation(bank(images, ["final", "shared"]), images, adapters, None) < 1e-12
