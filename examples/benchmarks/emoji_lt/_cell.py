"""A single run of the suite: train, then predict the validation, test and shift splits."""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _plan import TUNE, Cell

from lpt_peft.cli.common.build_adapter import build_model
from lpt_peft.cli.common.open_data import set_transforms
from lpt_peft.data import image_folder
from lpt_peft.data.images import LabelledImages
from lpt_peft.data.sources import ArrayImages
from lpt_peft.errors import StateError
from lpt_peft.metrics import ShotMetrics
from lpt_peft.metrics.result import SHOTS
from lpt_peft.recipe import make_accelerator, predict, train
from lpt_peft.recipe.training.phase_init import trained_parameters

EVALUATED = ("validation", "test", "shift")


@cache
def open_images(root: Path) -> dict[str, LabelledImages]:
    """Open the splits and decode their images, once per process; "shift" is optional."""
    splits: dict[str, LabelledImages] = {}
    names = None
    for name in ("train", *EVALUATED):
        if name == "shift" and not (root / name).is_dir():
            continue
        files = image_folder(root / name, names, allow_empty=names is not None)
        names = files.class_names
        pixels = np.stack([np.asarray(image) for image, _ in files])
        splits[name] = LabelledImages(ArrayImages(pixels, str(root / name)), files.labels, names, allow_empty=True)
    return splits


def prepare_process() -> None:
    """Let loading workers be forked; a spawned process would spawn them, with its imports and a copy of the images."""
    if sys.platform == "linux":
        multiprocessing.set_start_method("fork", force=True)


def run_cell(cell: Cell, root: Path) -> dict[str, Any]:
    """Train a row with a seed; return its accuracies, predictions, seconds and peak memory, or an error."""
    try:
        return _run_cell(cell, open_images(root))
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500], "diverged": isinstance(error, StateError)}


def _run_cell(cell: Cell, splits: dict[str, LabelledImages]) -> dict[str, Any]:
    on_gpu, run, images = torch.cuda.is_available(), cell.run, splits["train"]
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = build_model(run, images.class_names)
    set_transforms(splits, model.preprocess(), run.images)
    accelerator = make_accelerator(run.training)
    history = train(model, images, images.labels, run.training, accelerator=accelerator, progress=False)
    found: dict[str, Any] = {
        "seconds": round(time.perf_counter() - start, 1),
        "loss": history[-1]["loss"],
        "class_counts": images.class_counts,
        "trained_parameters": trained_parameters(model, run.training),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }
    for name in EVALUATED[:1] if cell.stage == TUNE else [name for name in EVALUATED if name in splits]:
        output, target = predict(model, splits[name], num_workers=0, accelerator=accelerator)
        metrics = ShotMetrics.from_rule(run.shot_rule, images.class_counts)
        metrics.update(output.logits, target)
        result = metrics.compute()
        found[name] = {shot: getattr(result, shot) for shot in SHOTS}
        if cell.stage != TUNE:
            found[name] |= {"prediction": output.logits.argmax(1).tolist(), "target": target.tolist()}
    return found
