"""The digits run: `recipe.fit` for each row with prompts, and a proof that the prompt file reads back."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lpt_peft._random import seeded
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.checkpoint import read_pair
from lpt_peft.checkpoint.files import write_pair
from lpt_peft.data.digits import NUM_CLASSES, DigitsLT, digits_counts
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.demo.backbone import glyph_config, glyph_vit
from lpt_peft.demo.figure import draw
from lpt_peft.demo.result import DemoResult, RowResult
from lpt_peft.demo.rows import EPOCHS, Row, rows
from lpt_peft.errors import ConfigError, LPTError
from lpt_peft.metrics import ShotMetrics, ShotResult
from lpt_peft.recipe import Splits, evaluate, fit, predict, run_phase
from lpt_peft.recipe.experiment import PROMPTS

RUNS = "runs"


class DemoError(LPTError):
    """The run contradicts itself: the prompt file did not give the predictions it was written with."""


def run_demo(
    output: Path, *, seeds: int = 1, epochs: int = EPOCHS, resume: bool = True, progress: bool = True
) -> DemoResult:
    """Train, test and write `results.json`, `digits.png` and the folder `prompts` into `output`.

    Args:
        output: Folder to write into; made if it is missing. Until all is done, what was trained is in `runs/` there.
        seeds: Repeat with seeds 0 to `seeds - 1`, for mean and spread.
        epochs: Passes over the training images, the same for every row.
        resume: Go on with a run that was broken off; False starts anew.
        progress: Show bars.

    Raises:
        ConfigError: `seeds` or `epochs` is too small.
        StateError: The run that was broken off had other settings.
        DemoError: The prompt file, read back into a fresh adapter, gave other predictions.
    """
    if seeds < 1 or epochs < 2:
        raise ConfigError(
            f"The digits run needs seeds of at least 1 and epochs of at least 2, got {seeds} and {epochs}."
        )
    output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    preprocess = glyph_config()["preprocess"]
    mean, std = tuple(preprocess["mean"]), tuple(preprocess["std"])
    train_set, test_set = DigitsLT("train", mean=mean, std=std, augment=True), DigitsLT("test", mean=mean, std=std)
    table: list[RowResult] = []
    lpt: LongTailPromptAdapter | None = None
    trained: list[Path] = []
    for number, row in enumerate(rows(epochs)):
        for seed in range(seeds):
            folder = output / RUNS / f"row{number}-seed{seed}"
            model, result = train_row(row, seed, train_set, test_set, folder, resume=resume, progress=progress)
            trained += [folder] if folder.exists() else []
            if seed == 0:
                table.append(RowResult(row.name, _trained_parameters(model, row)))
                if isinstance(model, LongTailPromptAdapter):
                    lpt = model  # the last row's is the one to keep
                    write_pair(output / PROMPTS, *read_pair(folder / PROMPTS))
                    table[-1].file_bytes = _prove(model, output / PROMPTS, test_set)
            table[-1].results.append(result)
    assert lpt is not None  # noqa: S101 - the last row has prompts; narrows the type
    done = DemoResult(
        rows=table,
        groups_per_class=_groups_per_class(lpt, test_set),
        dead_groups=lpt.pool.dead_groups(),
        rule=table[0].results[0].rule,
        seeds=list(range(seeds)),
        epochs=epochs,
        seconds=time.perf_counter() - start,
        prompt_file=str(output / PROMPTS),
    )
    (output / "results.json").write_text(json.dumps(done.to_dict(), indent=2, allow_nan=False) + "\n")
    draw(done, output / "digits.png")
    for folder in trained:  # and nothing else that may lie in a folder of this name
        shutil.rmtree(folder)
    with suppress(OSError):
        (output / RUNS).rmdir()
    return done


def train_row(
    row: Row,
    seed: int,
    train_set: DigitsLT,
    test_set: DigitsLT,
    folder: Path,
    *,
    resume: bool = True,
    progress: bool = True,
) -> tuple[nn.Module, ShotResult]:
    """One row with one seed: the trained model and its result on `test_set`; a row with prompts fills `folder`."""
    settings = replace(row.settings, seed=seed)
    with seeded(seed):
        model = row.build(NUM_CLASSES)
    bar = progress and f"{row.name}, seed {seed}"
    if isinstance(model, LongTailPromptAdapter):
        train_images = from_dataset(train_set, class_names=[str(digit) for digit in range(NUM_CLASSES)])
        parts = Splits(train=train_images, test=test_set)
        return model, fit(model, parts, settings, folder, resume=resume, progress=bar)["test"]
    run_phase(model, train_set, train_set.labels, settings, settings.shared, name="head", progress=bar)
    return model, evaluate(model, test_set, ShotMetrics.from_rule("lpt", digits_counts()), num_workers=0)


def _trained_parameters(model: nn.Module, row: Row) -> int:
    """Parameters that the row's phases learn, the head among them."""
    if not isinstance(model, LongTailPromptAdapter):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    learnt = {"head.weight"}
    learnt |= {"shared.prompts"} if row.settings.shared.epochs else set()
    learnt |= {"pool.prompts", "pool.keys"} if row.settings.group.epochs else set()
    return sum(model.get_parameter(name).numel() for name in learnt)


def _prove(adapter: LongTailPromptAdapter, folder: Path, test_set: DigitsLT) -> int:
    """Read the prompt file onto a fresh backbone and compare the predictions; its size in bytes."""
    twin = LongTailPromptAdapter.from_pretrained(folder, glyph_vit())
    ours, theirs = (predict(model, test_set, num_workers=0)[0].logits for model in (adapter, twin))
    if not torch.equal(ours, theirs):
        raise DemoError(
            f"The prompt file in {folder} gives other predictions than the adapter it was written from: largest "
            f"difference {float((ours - theirs).abs().max()):.3g}. Please report this."
        )
    return sum((folder / name).stat().st_size for name in ("config.json", "prompts.safetensors"))


def _groups_per_class(adapter: LongTailPromptAdapter, test_set: DigitsLT) -> list[list[float]]:
    """Share of each class's images (row) that chose each group (column)."""
    output, labels = predict(adapter, test_set, num_workers=0)
    chosen = torch.zeros(len(labels), adapter.prompt_config.pool_size).scatter_(1, output.groups, 1.0)
    return [chosen[labels == digit].mean(0).tolist() for digit in range(NUM_CLASSES)]
