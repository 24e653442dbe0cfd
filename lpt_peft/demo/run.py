"""The digits run: train each row, and check that the prompt file gives the same predictions when loaded again."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torchvision.utils import save_image

from lpt_peft._random import seeded
from lpt_peft._run_folder import PROMPTS
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.backbones.bundled.glyph_vit import glyph_config, glyph_vit
from lpt_peft.checkpoint import read_prompt_file, write_prompt_file
from lpt_peft.data.digits import NUM_CLASSES, DigitsLT
from lpt_peft.data.from_dataset import from_dataset
from lpt_peft.demo.figure import draw
from lpt_peft.demo.result import DemoResult, RowResult
from lpt_peft.demo.rows import EPOCHS, Row, rows
from lpt_peft.errors import ConfigError, LPTError
from lpt_peft.metrics import ShotResult
from lpt_peft.recipe import Splits, TrainSettings, fit, predict
from lpt_peft.recipe.analyse.run import AnalysedImages, analyse
from lpt_peft.recipe.experiment import RESULTS, write_json
from lpt_peft.recipe.methods import Model
from lpt_peft.recipe.training.phase_init import trained_parameters
from lpt_peft.report import write_report

RUNS, IMAGES, REPORT = "runs", "test", "report.html"
SHOT_RULE = "lpt"
NAMES = [str(digit) for digit in range(NUM_CLASSES)]


class DemoError(LPTError):
    """The prompt file gives other predictions than the adapter that wrote it."""


def run_demo(
    output: Path, *, seeds: int = 1, epochs: int = EPOCHS, resume: bool = True, progress: bool = True
) -> DemoResult:
    """Train and test; write `results.json`, pictures, a report, and the folders `prompts` and `test` into `output`.

    Args:
        output: Folder to write into; created if missing. Its `runs/` holds the trained rows until the run is complete.
        seeds: Number of seeds, 0 to `seeds - 1`, for mean and spread.
        epochs: Passes over the training images, the same for every row.
        resume: Resume an interrupted run; False starts again.
        progress: Show progress: a bar on a terminal, otherwise a line per epoch.

    Raises:
        ConfigError: `seeds` or `epochs` is too small.
        StateError: The interrupted run had other settings.
        DemoError: The prompt file, loaded into a new adapter, gave other predictions.
    """
    if seeds < 1 or epochs < 2:
        raise ConfigError(
            f"The digits run needs at least 1 seed and at least 2 epochs, got --seeds {seeds} and --epochs {epochs}."
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
            trained.append(folder)
            if seed == 0:
                table.append(RowResult(row.name, trained_parameters(model, row.settings)))
                if isinstance(model, LongTailPromptAdapter):
                    lpt = model  # the last row's adapter is kept
                    write_prompt_file(output / PROMPTS, read_prompt_file(folder / PROMPTS))
                    table[-1].file_bytes = _check_prompt_file(model, output / PROMPTS, test_set)
            table[-1].results.append(result)
    assert lpt is not None  # noqa: S101 - the last row has prompts; narrows the type
    demo_result = DemoResult(
        rows=table,
        groups_per_class=_groups_per_class(lpt, test_set),
        dead_groups=lpt.pool.dead_groups(),
        rule=table[0].results[0].rule,
        seeds=list(range(seeds)),
        epochs=epochs,
        seconds=time.perf_counter() - start,
        prompt_file=str(output / PROMPTS),
    )
    write_json(output / RESULTS, demo_result.to_dict())
    draw(demo_result, output / "digits.png")
    save_images(output / IMAGES)
    best = output / RUNS / f"row{len(table) - 1}-seed0"
    _report(lpt, best, output / REPORT, (mean, std), progress=progress)
    for folder in trained:  # and nothing else that a folder of this name may hold
        shutil.rmtree(folder)
    with suppress(OSError):
        (output / RUNS).rmdir()
    return demo_result


def train_row(
    row: Row,
    seed: int,
    train_set: DigitsLT,
    test_set: DigitsLT,
    folder: Path,
    *,
    resume: bool = True,
    progress: bool = True,
) -> tuple[Model, ShotResult]:
    """Train a row with a seed into `folder`; return the model and its result on `test_set`."""
    settings = replace(row.settings, seed=seed)
    with seeded(seed):
        model = row.build()
    bar = progress and f"{row.name}, seed {seed}"
    train_images = from_dataset(train_set, class_names=NAMES)
    splits = Splits(train=train_images, test=test_set)
    results = fit(model, splits, settings, folder, shot_rule=SHOT_RULE, resume=resume, progress=bar)
    return model, results["test"]


def _report(
    adapter: LongTailPromptAdapter,
    folder: Path,
    output: Path,
    norm: tuple[tuple[float, ...], tuple[float, ...]],
    *,
    progress: bool,
) -> None:
    """Analyse the run of the last row on the test images, and write its page."""
    mean, std = norm
    train, test = (from_dataset(DigitsLT(split, mean=mean, std=std), class_names=NAMES) for split in ("train", "test"))
    images = AnalysedImages(evaluation=test, split="test", source="handwritten digits of scikit-learn", train=train)
    analysis = analyse(
        adapter,
        images,
        class_names=NAMES,
        class_counts=train.class_counts,
        shot_rule=SHOT_RULE,
        settings=TrainSettings(num_workers=0),
        progress=progress,
    )
    plain = DigitsLT("test", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    write_report(
        folder,
        output=output,
        analysis=analysis,
        images=from_dataset(plain, class_names=NAMES),
        command=["lpt-peft", "demo", "--output", str(output.parent)],
    )


def save_images(folder: Path) -> None:
    """Write the test images as `folder/DIGIT/NUMBER.png`; PNG rounds values from 0 to 1 to multiples of 1/255."""
    dataset = DigitsLT("test", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    for number in range(len(dataset)):
        image, label = dataset[number]
        file = folder / str(label) / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_image(image, file)


def _check_prompt_file(adapter: LongTailPromptAdapter, folder: Path, test_set: DigitsLT) -> int:
    """Load the prompt file on a new backbone, compare the predictions, and return the size of the file in bytes."""
    loaded = LongTailPromptAdapter.from_pretrained(folder, glyph_vit().to(adapter.head.weight.device))
    expected, actual = (predict(model, test_set, num_workers=0)[0].logits for model in (adapter, loaded))
    if not torch.equal(expected, actual):
        raise DemoError(
            f"The prompt file in {folder} gives other predictions than the adapter that wrote it: largest "
            f"difference of logits {float((expected - actual).abs().max()):.3g}. Please report this."
        )
    return sum((folder / name).stat().st_size for name in ("config.json", "prompts.safetensors"))


def _groups_per_class(adapter: LongTailPromptAdapter, test_set: DigitsLT) -> list[list[float]]:
    """Return the share of each class's images (row) for which each group (column) was chosen."""
    output, labels = predict(adapter, test_set, num_workers=0)
    chosen = torch.zeros(len(labels), adapter.prompt_config.pool_size).scatter_(1, output.groups, 1.0)
    return [chosen[labels == digit].mean(0).tolist() for digit in range(NUM_CLASSES)]
