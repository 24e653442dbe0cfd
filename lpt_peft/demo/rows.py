"""The five rows of the digits run: same backbone, same cosine head, same number of training images seen.

Settings were chosen on validation images, over several divisions of the non-test images
(`examples/benchmarks/digits_search.py`). Test images were not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.backbones.bundled.glyph_vit import glyph_vit
from lpt_peft.data.digits import NUM_CLASSES
from lpt_peft.recipe.methods import Model
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from lpt_peft.vit_classifier import ViTClassifier

EPOCHS = 10
SIZES: Mapping[str, Any] = {"prompt_length": 8, "pool_size": 10, "top_k": 2, "query": "block_k"}
_BASE = TrainSettings(
    phases="decoupled",
    batch_size=16,
    optimizer="adamw",
    init_prompts="random",
    init_head="class_mean",
    init_groups="shared",
    clip_norm=5.0,
    num_workers=0,  # digits are in memory
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: the settings of its run, and arguments of `LongTailPromptAdapter.wrap`."""

    name: str
    settings: TrainSettings
    prompts: Mapping[str, Any] = field(default_factory=lambda: SIZES)

    def build(self) -> Model:
        """Wrap a new backbone for the method of the settings; head and prompts are random."""
        method = self.settings.method
        if method == "linear_probe":
            return ViTClassifier.wrap(glyph_vit(), NUM_CLASSES, method=method)
        return LongTailPromptAdapter.wrap(glyph_vit(), NUM_CLASSES, **self.prompts)


def rows(epochs: int = EPOCHS) -> list[Row]:
    """Return the five rows; each trains for `epochs` epochs of steps of 16 images."""
    skipped = PhaseSettings(epochs=0)
    plain: dict[str, Any] = {"sampling": "instance", "loss": "cross_entropy"}
    dual: dict[str, Any] = {"samples_per_class": 1}
    probe = PhaseSettings(epochs=epochs, learning_rate=0.06, weight_decay=0.01)
    prompts = PhaseSettings(epochs=epochs, learning_rate=0.01, weight_decay=0.01)
    second = max(1, epochs // 5) if epochs > 1 else 0
    first = replace(prompts, epochs=epochs - second)
    group = PhaseSettings(epochs=second, learning_rate=0.003, pool_learning_rate=0.01, weight_decay=0.01)
    head, deep = replace(_BASE, method="linear_probe", shared=probe), replace(_BASE, method="vpt_deep", shared=prompts)
    return [
        Row(name="linear probe, cross-entropy", settings=replace(head, **plain)),
        Row(name="linear probe, A-GCL", settings=replace(head, **dual)),
        Row(name="VPT-Deep, cross-entropy", settings=replace(deep, **plain)),
        Row(name="LPT, phase 1", settings=replace(_BASE, shared=prompts, group=skipped, **dual)),
        Row(name="LPT", settings=replace(_BASE, shared=first, group=group, **dual)),
    ]
