"""Banks on models of every ecosystem: unequal prompts where attention takes masks, and an error elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lpt_peft import LongTailPromptAdapter, PromptBank
from lpt_peft.errors import BackboneError
from tests.backbones.models import ROWS, SIDE, make
from tests.bank.tasks import deviation, make_adapter, save

EQUAL: dict[str, dict[str, Any]] = {
    "shared": {"phase": "shared", "pool_size": 3, "num_classes": 2},
    "final": {"pool_size": 4, "top_k": 3, "num_classes": 6},
    "block_k": {"pool_size": 2, "query": "block_k"},
}
UNEQUAL: dict[str, dict[str, Any]] = {"short": {"prompt_length": 1}, "first": {"shared_layers": 0}}
NO_MASKS = {"timm BEiT"}
"""Models whose attention takes no mask."""

# Some norms and rotary tables compute in float32 whatever their input.
FLOAT32_INSIDE = {"timm EVA-02", "transformers DINOv3"}


def build(row: str, folder: Path, kinds: dict[str, dict[str, Any]]) -> tuple[PromptBank, dict[str, Any]]:
    """A bank, and the adapters of the tasks, which are saved but not yet in the bank."""
    model, adapters = make(row), {}
    for number, (kind, options) in enumerate(kinds.items()):
        sizes = {"prompt_length": 3, "shared_layers": 1, "top_k": 2, **options}
        adapters[kind] = make_adapter(model, number, **sizes)
        save(adapters[kind], folder / kind)
    return PromptBank(model), adapters


def images_of(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def in_float64(bank: PromptBank, adapters: dict[str, LongTailPromptAdapter]) -> None:
    for model in (bank.vit, *adapters.values()):
        model.double()


@pytest.mark.parametrize("row", ROWS)
def test_tasks_of_equal_length(row: str, tmp_path: Path) -> None:
    bank, adapters = build(row, tmp_path, EQUAL)
    for kind in EQUAL:
        bank.add(kind, tmp_path / kind)
    in_float64(bank, adapters)
    images = images_of(6)
    tolerance = 1e-5 if row in FLOAT32_INSIDE else 1e-12
    assert deviation(bank(images, [*EQUAL] * 2), images, adapters, None) < tolerance
    for kind in EQUAL:
        assert deviation(bank(images[:2], kind), images[:2], adapters, None) < tolerance
    output = bank(images, None)
    bank.unwrap()
    assert deviation(output, images, adapters, bank.backbone.plain_feature) < tolerance


@pytest.mark.parametrize("row", sorted(ROWS.keys() - NO_MASKS))
def test_tasks_of_unequal_length(row: str, tmp_path: Path) -> None:
    kinds = {**EQUAL, **UNEQUAL}
    bank, adapters = build(row, tmp_path, kinds)
    for kind in kinds:
        bank.add(kind, tmp_path / kind)
    in_float64(bank, adapters)
    images = images_of(2 * len(kinds) + 1)
    tolerance = 1e-5 if row in FLOAT32_INSIDE else 1e-12
    output = bank(images, [*kinds, None, *kinds])
    assert deviation(output, images, adapters, bank.backbone.plain_feature) < tolerance


@pytest.mark.parametrize("row", sorted(NO_MASKS))
@pytest.mark.parametrize("kind", UNEQUAL)
def test_unequal_tasks_are_refused_without_masks(row: str, kind: str, tmp_path: Path) -> None:
    bank, adapters = build(row, tmp_path, {**EQUAL, **UNEQUAL})
    for equal in EQUAL:
        bank.add(equal, tmp_path / equal)
    with pytest.raises(BackboneError, match="unequal length cannot be mixed.*same prompt_length and shared_layers"):
        bank.add(kind, tmp_path / kind)
    assert bank.tasks == tuple(EQUAL)
    with pytest.raises(BackboneError, match="either with prompts or plain"):
        bank(images_of(2).float(), ["final", None])
    images = images_of(2).float()
    assert deviation(bank(images, "final"), images, adapters, None) < 1e-3
