"""A finished run of random numbers: its folder, analysis and images. No tests here."""

from __future__ import annotations

import base64
import json
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from lpt_peft.data.images import LabelledImages
from lpt_peft.data.sources import ArrayImages
from lpt_peft.recipe.analyse import sections
from lpt_peft.recipe.predictions import Predictions, image_names, write_predictions
from tests.analysis.sample import random_measured, sample_analysis


def class_names(classes):
    return [f"species {label}" for label in range(classes)]


def labelled_images(target, names):
    """Images of a size of 16 pixels; the red channel is the position modulo 256."""
    pixels = np.zeros((len(target), 16, 16, 3), dtype=np.uint8)
    pixels[..., 0] = (np.arange(len(target)) % 256)[:, None, None]
    return LabelledImages(ArrayImages(pixels, "pixels"), target, names, allow_empty=True)


def full_analysis(classes=6, images=300, groups=8, names=None):
    """An analysis with all sections."""
    measured = random_measured(classes, images, groups)
    analysis = sample_analysis(classes, images, groups)
    counts = analysis["classes"]["train_images"]
    analysis["classes"]["name"] = names or class_names(classes)
    model = {"method": "lpt", "phase": "group", "classes": classes, "groups": groups, "top_k": 2}
    data = {
        "source": "photos",
        "split": "test",
        "images": images,
        "shot_rule": "many: n > 100, medium: 20 < n <= 100, few: n <= 20",
        "feature_images": images,
        "train_images": images,
        "variant_images": images,
    }
    left_out = {}
    if isinstance(analysis["projection"], str):  # too few images per class
        left_out["projection"] = analysis.pop("projection")
    return {
        "format_version": 1,
        "lpt_peft": "0.1.0",
        "seconds": 1.0,
        "model": model,
        "data": data,
        "left_out": left_out,
        "accuracy": sections.accuracy_section(measured, counts, "lpt"),
        "weak": sections.weak_section(measured, classes),
        **analysis,
    }


def history(epochs=3):
    rows = []
    for phase in ("shared", "group"):
        for epoch in range(epochs):
            validation = {"overall": 0.5 + 0.1 * epoch, "many": 0.8, "medium": 0.5, "few": None}
            rows.append({"phase": phase, "epoch": epoch, "loss": 2.0 / (1 + epoch), "validation": validation})
    return rows


def predictions(classes, images, groups, names, seed=0):
    """Predictions of the measured model of `full_analysis`, and its images."""
    measured = random_measured(classes, images, groups)
    wrong = torch.rand(images, generator=torch.Generator().manual_seed(seed)) < 0.1
    prediction = measured.prediction if not seed else torch.where(wrong, measured.target, measured.prediction)
    split = labelled_images(measured.target.tolist(), names)
    found = Predictions(
        target=measured.target,
        prediction=prediction,
        probability=measured.probability,
        groups=measured.groups,
        images=image_names(split),
    )
    return found, split


def write_run(folder, classes=6, images=300, groups=8, names=None, seed=0):
    """Write the folder of a run; return its analysis and test split."""
    names = names or class_names(classes)
    analysis = full_analysis(classes, images, groups, names)
    found, split = predictions(classes, images, groups, names, seed)
    training = {"method": "lpt", "seed": seed, "shared": {"epochs": 3}, "group": {"epochs": 3}}
    settings = {"data": "photos", "backbone": "glyph_vit", "training": training, "prompts": {"pool_size": groups}}
    overall = analysis["accuracy"]["overall"]["estimate"]
    (folder / "analysis").mkdir(parents=True)
    files = {
        "analysis/analysis.json": analysis,
        "settings.json": settings,
        "history.json": history(),
        "results.json": {"test": {"num_images": images, "overall": overall, "many": None, "medium": 0.5, "few": 0.25}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    write_predictions(folder / "predictions.safetensors", {"test": found})
    return analysis, split


def red_of(data_uri):
    """Red channel in the middle of a thumbnail."""
    image = Image.open(BytesIO(base64.b64decode(data_uri.partition(",")[2])))
    assert max(image.size) == 96
    return image.getpixel((48, 48))[0]
