"""The five rows of the digits run: same backbone, same cosine head, same number of training images seen.

Settings were chosen on validation images, over several divisions of the non-test images
(`examples/benchmarks/digits_search.py`). Test images were not used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.backbones.bundled.glyph_vit import glyph_vit
from lpt_peft.heads import CosineClassifier
from lpt_peft.output import AdapterOutput
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings

EPOCHS = 20
_BASE = TrainSettings(batch_size=32, samples_per_class=1, clip_norm=5.0, num_workers=0)  # digits are in memory


class LinearProbe(nn.Module):
    """A cosine head on frozen features, called like an adapter."""

    def __init__(self, vit: nn.Module, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.head_drop = nn.Dropout(dropout)
        self.head = CosineClassifier(vit.num_features, num_classes)  # type: ignore[arg-type]

    def forward(self, images: Tensor, return_output: bool = True) -> AdapterOutput:
        """Classify images (B, 3, 32, 32); the `AdapterOutput` has no groups."""
        with torch.no_grad():
            features = self.vit.forward_head(self.vit.forward_features(images), pre_logits=True)  # type: ignore[operator]
        empty = features.new_empty(len(features), 0)
        return AdapterOutput(self.head(self.head_drop(features)), features, features, empty, empty.long())


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table."""

    name: str
    settings: TrainSettings
    build: Callable[[int], nn.Module]


def build_probe(num_classes: int) -> LinearProbe:
    """Return a linear probe on the backbone."""
    return LinearProbe(glyph_vit(), num_classes)


def build_adapter(num_classes: int) -> LongTailPromptAdapter:
    """Wrap the backbone: 8 prompt tokens per block, 10 groups, 2 groups per image."""
    return LongTailPromptAdapter.wrap(glyph_vit(), num_classes, prompt_length=8, pool_size=10, top_k=2)


def rows(epochs: int = EPOCHS) -> list[Row]:
    """Return the five rows; each trains for `epochs` epochs of steps of 32 images."""
    skipped = PhaseSettings(epochs=0)
    plain: dict[str, Any] = {"sampling": "instance", "loss": "cross_entropy", "group": skipped}
    probe = PhaseSettings(epochs=epochs, learning_rate=2.0, weight_decay=0.01)
    prompts = PhaseSettings(epochs=epochs, learning_rate=0.4, weight_decay=0.01)
    second = max(1, epochs // 4) if epochs > 1 else 0
    first = replace(prompts, epochs=epochs - second)
    group = PhaseSettings(epochs=second, learning_rate=0.2, weight_decay=0.01)
    return [
        Row(name="linear probe, cross-entropy", settings=replace(_BASE, shared=probe, **plain), build=build_probe),
        Row(name="linear probe, A-GCL", settings=replace(_BASE, shared=probe, group=skipped), build=build_probe),
        Row(name="VPT-Deep, cross-entropy", settings=replace(_BASE, shared=prompts, **plain), build=build_adapter),
        Row(name="LPT, phase 1", settings=replace(_BASE, shared=prompts, group=skipped), build=build_adapter),
        Row(name="LPT", settings=replace(_BASE, shared=first, group=group), build=build_adapter),
    ]
