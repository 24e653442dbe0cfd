"""Output folders of runs, written without a training. No tests here."""

from __future__ import annotations

import json

import torch

from lpt_peft.metrics import shot_metrics
from lpt_peft.metrics.result import SHOTS
from lpt_peft.metrics.shot_rules import SHOT_RULES
from lpt_peft.recipe import TrainSettings
from lpt_peft.recipe.class_report import split_results
from lpt_peft.recipe.predictions import Predictions
from tests.checkpoint.adapters import tiny_adapter

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
COUNTS = [5, 300, 120, 60, 30, 12, 2]
IMAGES = 20


def write_run(folder, *, seed=0, names=NAMES, settings=None, split="test", **options):
    """Write prompts/ and results.json; the predictions are random, and those of class 6 are always wrong."""
    rule = SHOT_RULES["lpt"]
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(7).repeat_interleave(IMAGES)
    right = (torch.rand(len(target), generator=generator) < 0.6) & (target < 6)
    probability = 0.5 + 0.5 * torch.rand(len(target), generator=generator)
    predictions = Predictions(target, torch.where(right, target, (target + 1) % 7), probability)
    correct = torch.bincount(target[right], minlength=7)
    result = shot_metrics(correct, torch.full((7,), IMAGES), COUNTS)
    entries = {split: split_results(result, predictions, names, COUNTS, rule)}
    tiny_adapter().save_pretrained(
        folder / "prompts",
        class_counts=COUNTS,
        label_names=names,
        training={
            "recipe": (settings or TrainSettings()).to_dict(),
            "metrics": {split: {shot: getattr(result, shot) for shot in SHOTS}},
            "rule": f"{rule}; mean over classes",
        },
        **options,
    )
    (folder / "results.json").write_text(json.dumps(entries), encoding="utf-8")
    return entries
