"""Draws docs/images/find_lr.png, a learning-rate range test on long-tailed digits: `python docs/images/find_lr.py`.

Phase "shared" of LPT on the bundled backbone with steps of 32 images. `python docs/images/find_lr.py adamw` prints the
suggestion for AdamW. Needs the extra `lpt_peft[demo]`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lpt_peft import LongTailPromptAdapter
from lpt_peft._random import seeded
from lpt_peft.backbones.bundled.glyph_vit import glyph_config, glyph_vit
from lpt_peft.data.digits import NUM_CLASSES, DigitsLT
from lpt_peft.recipe import TrainSettings, draw_learning_rates, find_learning_rate


def main(optimizer: str = "sgd") -> None:
    """Test SGD and draw the picture, or test AdamW."""
    preprocess = glyph_config()["preprocess"]
    images = DigitsLT("train", mean=tuple(preprocess["mean"]), std=tuple(preprocess["std"]), augment=True)
    settings = TrainSettings(
        phases="shared",
        init_prompts="random",
        batch_size=32,
        samples_per_class=1,
        clip_norm=5.0,
        num_workers=0,
        optimizer=optimizer,  # type: ignore[arg-type]
    )
    with seeded(0):
        adapter = LongTailPromptAdapter.wrap(glyph_vit(), NUM_CLASSES, prompt_length=8, pool_size=10)
    curve = find_learning_rate(adapter, images, images.labels, settings)
    print(f"{optimizer}: {len(curve.losses)} steps, suggestion {curve.suggestion}")  # noqa: T201
    if optimizer == "sgd":
        draw_learning_rates(curve, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
