"""Images of stripes, settings of a small run, and comparison of its prompts. No tests here."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from lpt_peft import LongTailPromptAdapter
from lpt_peft.cli.common.build_adapter import build_run_backbone
from lpt_peft.cli.common.run_settings import RunSettings

BACKBONE = ["--backbone", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32"]
SMALL = [
    "--batch-size",
    "16",
    "--shared.epochs",
    "2",
    "--group.epochs",
    "2",
    "--prompt-length",
    "2",
    "--pool-size",
    "4",
]
# Phases in sequence, without a pass over images for the prompts.
SMALL += ["--phases", "decoupled", "--query", "final", "--optimizer", "sgd", "--init-prompts", "random"]
SMALL += ["--init-groups", "shared", "--group.pool-learning-rate", "0.02"]
SMALL += ["--shared.learning-rate", "2", "--flip", "0", "--scale", "0.9", "1", "--crop-pct", "1"]
NAMES = ["ant", "bee", "cat"]
FROM_PRETRAINED = LongTailPromptAdapter.from_pretrained  # tests replace the attribute


def write_images(folder, counts, seed=0, names=NAMES):
    """Write class folders of images; the place of the stripe depends on the class."""
    generator = np.random.default_rng(seed)
    for label, (name, count) in enumerate(zip(names, counts, strict=True)):
        for number in range(count):
            pixels = generator.integers(0, 80, (32, 32, 3), dtype=np.uint8)
            pixels[:, 10 * label : 10 * label + 10] += 150
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def saved_prompts(output):
    return load_file(output / "prompts" / "prompts.safetensors")


def same_prompts(first, second):
    first, second = saved_prompts(first), saved_prompts(second)
    return all(torch.equal(first[name], second[name]) for name in first)


def load_adapter(folder, *_, **options):
    """Load a prompt file on the backbone of BACKBONE, whose random weights timm does not have."""
    run = RunSettings(backbone="vit_tiny_patch16_224", pretrained=False, img_size=32)
    return FROM_PRETRAINED(folder, build_run_backbone(run), **options)
