"""A single run of the suite: train, then predict the validation, test and shift splits."""

from __future__ import annotations

import time
import traceback
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _plan import TUNE, Cell, Settings

from lpt_peft.cli.common.build_adapter import build_adapter
from lpt_peft.cli.common.open_data import set_transforms
from lpt_peft.cli.common.run_settings import ImageSettings, PromptSettings, RunSettings
from lpt_peft.data import image_folder
from lpt_peft.data.images import LabelledImages
from lpt_peft.data.sources import ArrayImages
from lpt_peft.errors import StateError
from lpt_peft.metrics import ShotMetrics
from lpt_peft.metrics.result import SHOTS
from lpt_peft.recipe import make_accelerator, predict, train
from lpt_peft.recipe.settings import TrainSettings

SPLITS = ("train", "validation", "test", "shift")


def run_settings(row: Settings, seed: int, **others: Any) -> RunSettings:
    """Convert a row to the settings of `lpt-peft train`."""
    nested: Settings = {"prompts": {}, "images": {}, "training": {"seed": seed}}
    kinds = {"prompts": PromptSettings, "images": ImageSettings, "training": TrainSettings}
    for name, value in without_none(row).items():
        kind = next((kind for kind, cls in kinds.items() if name in {field.name for field in fields(cls)}), None)
        (nested if kind is None else nested[kind])[name] = value
    return RunSettings.from_dict({**nested, **others})


def without_none(row: Settings) -> Settings:
    """Replace "None", which stands for a null that TOML lacks."""
    pairs = ((name, without_none(value) if isinstance(value, dict) else value) for name, value in row.items())
    return {name: None if value == "None" else value for name, value in pairs}


class Images:
    """The splits, decoded once per process."""

    def __init__(self, root: Path) -> None:
        self.splits: dict[str, LabelledImages] = {}
        names = None
        for name in SPLITS:
            if (root / name).is_dir():
                split = image_folder(root / name, names, allow_empty=names is not None)
                names = split.class_names
                pixels = np.stack([np.asarray(split[index][0]) for index in range(len(split))])
                source = ArrayImages(pixels, str(root / name))
                self.splits[name] = LabelledImages(source, split.labels, names, allow_empty=True)
        self.train = self.splits["train"]


@cache
def images(root: Path) -> Images:
    """Open the data set, once per process."""
    return Images(root)


def run_cell(cell: Cell, root: Path, weights: Path | None) -> dict[str, Any]:
    """Train a row with a seed; return its accuracies, predictions, seconds and peak memory, or an error."""
    try:
        return _run_cell(cell, images(root), weights)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500], "diverged": isinstance(error, StateError)}


def _run_cell(cell: Cell, data: Images, weights: Path | None) -> dict[str, Any]:
    others = {} if weights is None else {"backbone_weights": str(weights)}
    run = run_settings(cell["settings"], cell["seed"], **others)
    run.check()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = build_adapter(run, data.train.class_names)
    set_transforms(data.splits, model.preprocess(), run.images)
    accelerator = make_accelerator(run.training)
    history = train(model, data.train, data.train.labels, run.training, accelerator=accelerator, progress=False)
    found: dict[str, Any] = {
        "seconds": round(time.perf_counter() - start, 1),
        "loss": history[-1]["loss"],
        "class_counts": data.train.class_counts,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "peak_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else None,
    }
    splits = ("validation",) if cell["stage"] == TUNE else ("validation", "test", "shift")
    for name in (name for name in splits if name in data.splits):
        output, target = predict(model, data.splits[name], num_workers=0, accelerator=accelerator)
        metrics = ShotMetrics.from_rule(run.shot_rule, data.train.class_counts)
        metrics.update(output.logits, target)
        result = metrics.compute()
        found[name] = {shot: getattr(result, shot) for shot in SHOTS}
        found["rule"] = result.rule
        if cell["stage"] != TUNE:
            found[name] |= {"prediction": output.logits.argmax(1).tolist(), "target": target.tolist()}
    return found
