"""A trained-looking model of each kind on a tiny ViT, and images. No tests here."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config

from lpt_peft import LongTailPromptAdapter
from lpt_peft.vit_classifier import ViTClassifier
from tests.conftest import tiny_vit

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def adapter_of(phase="group", vit=None, **sizes):
    """An adapter whose head and prompts matter, with names and a temperature."""
    vit = tiny_vit(num_classes=0) if vit is None else vit
    adapter = LongTailPromptAdapter.wrap(vit, len(NAMES), pool_size=4, prompt_length=2, logit_scale=8, **sizes)
    with torch.no_grad():
        for parameter in (adapter.shared.prompts, adapter.pool.prompts, adapter.head.weight):
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    adapter.phase = phase
    return described(adapter)


def classifier_model_of(method, vit=None):
    """A `ViTClassifier` with a random head."""
    vit = tiny_vit(num_classes=0) if vit is None else vit
    model = ViTClassifier.wrap(vit, len(NAMES), method=method)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(3))
    return described(model)


def described(model, **changes):
    """Set the metadata that a prompt file of a run has, with unusual values."""
    preprocess = {"exif": False, "background": [0, 0, 255], "crop_pct": 0.5}
    settings = {"label_names": tuple(NAMES), "temperature": 0.7, "preprocess": preprocess, **changes}
    model.metadata = replace(model.metadata, **settings)
    return model.eval()


def pictures(count=6, seed=0):
    """PIL images of several sizes and modes."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        height, width = int(generator.integers(33, 60)), int(generator.integers(33, 60))
        pixels = generator.integers(0, 256, (height, width, 4), dtype=np.uint8)
        mode = ("RGB", "RGBA", "L")[number % 3]
        found.append(Image.fromarray(pixels).convert(mode))
    return found


def by_hand(model, images, temperature=0.7, crop_pct=0.5, background=(0, 0, 255)):
    """Probabilities (N, C) without the library's transforms: resize, centre crop, normalization of PIL images.

    The metadata of `described` is written out; timm gives mean and std.
    """
    config = resolve_model_data_config(model.vit)
    rows = []
    for image in images:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        rgb = canvas.convert("RGB")
        short = int(32 / crop_pct)
        scale = short / min(rgb.size)
        size = [short if side == min(rgb.size) else int(short * side / min(rgb.size)) for side in rgb.size]
        assert scale > 1
        resized = rgb.resize(size, Image.Resampling.BICUBIC)
        left, top = round((resized.width - 32) / 2), round((resized.height - 32) / 2)
        crop = np.asarray(resized.crop((left, top, left + 32, top + 32)), dtype=np.float32)
        normalized = (crop / 255 - np.float32(config["mean"])) / np.float32(config["std"])
        rows.append(torch.from_numpy(normalized).permute(2, 0, 1))
    with torch.no_grad():
        return (model(torch.stack(rows)) / temperature).softmax(1)


def write_run(folder, model, **settings):
    """Write the output folder of a run by hand: settings.json, and prompts/ or model/."""
    kind = "prompts" if isinstance(model, LongTailPromptAdapter) else "model"
    model.save_pretrained(folder / kind)
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder
