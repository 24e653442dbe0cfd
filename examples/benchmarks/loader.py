"""Throughput of the training loader, and the share of loading in an epoch of `lpt-peft train`.

    python examples/benchmarks/loader.py

Writes JPEGs of 500 px into a temporary folder. The first table compares the loader of a training phase, including
crops, for several numbers of worker processes with decoding alone: Pillow in a single process. The second compares an
epoch of `lpt-peft train` with the sum of its components: the same batches loaded without training, and the same steps
on batches in memory. Rounds are interleaved, and the minimum is reported, since interference only adds time.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from lpt_peft.cli import main as lpt_peft
from lpt_peft.cli.common.build_adapter import build_adapter
from lpt_peft.cli.common.open_data import open_splits, set_transforms
from lpt_peft.cli.common.run_settings import RunSettings
from lpt_peft.data.images import LabelledImages
from lpt_peft.recipe import PhaseSettings, TrainSettings, make_accelerator
from lpt_peft.recipe.loading.batches import batches, steps_per_epoch
from lpt_peft.recipe.progress import Reporter
from lpt_peft.recipe.training.loop import Loop
from lpt_peft.recipe.training.phase import PhaseRun

QUALITY = 90


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    num_images: int = 192
    num_classes: int = 4
    pixels: int = 500
    """Longer side of the JPEGs; the shorter side is three quarters of it."""
    img_size: int = 64
    """Input size of the ViT."""
    model: str = "vit_tiny_patch16_224"
    batch_size: int = 32
    """Images of a step, both halves."""
    workers: tuple[int, ...] = (0, 1, 2)
    rounds: int = 5


def write_jpegs(folder: Path, settings: Settings) -> float:
    """Write class folders of images with large shapes, texture and grain; return the mean file size in KiB."""
    generator = np.random.default_rng(0)
    height, width = settings.pixels * 3 // 4, settings.pixels
    sizes = []
    for index in range(settings.num_images):
        picture = np.zeros((height, width, 3))
        for cells, strength in ((4, 70), (16, 35), (64, 18), (width, 9)):
            field = generator.normal(0, strength, (max(1, cells * 3 // 4), cells, 3))
            for channel in range(3):
                layer = Image.fromarray(field[..., channel].astype(np.float32))
                picture[..., channel] += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
        path = folder / f"class {index % settings.num_classes}" / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)
        sizes.append(path.stat().st_size / 1024)
    return statistics.mean(sizes)


def seconds_of(action: Callable[[], Any]) -> float:
    """Duration of a call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class Benchmark:
    """Components of an epoch, to be timed separately."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        phase = PhaseSettings(epochs=1)
        training = TrainSettings(batch_size=settings.batch_size, phases="shared", shared=phase, init_prompts="random")
        run = RunSettings(backbone=settings.model, pretrained=False, img_size=settings.img_size, training=training)
        splits = open_splits(str(folder), run.images, 0)
        self.images: LabelledImages = splits["train"]
        self.training = training
        self._run, self._phase = run, phase
        set_transforms(splits, build_adapter(run, self.images.class_names).backbone.preprocess(), run.images)
        self._loop = Loop(
            dataset=self.images,
            labels=self.images.labels,
            settings=training,
            criterion=None,
            accelerator=make_accelerator(training),
            history=[],
            reporter=Reporter(False, True),
        )
        self._batches = list(batches(self.images, self.images.labels, training, "shared", epochs=1))

    def decode(self) -> None:
        """Decode every file with Pillow."""
        for path in self.folder.rglob("*.jpg"):
            with Image.open(path) as image:
                image.convert("RGB")

    def load(self, workers: int) -> None:
        """Load all batches of an epoch."""
        training = replace(self.training, num_workers=workers)
        for _ in batches(self.images, self.images.labels, training, "shared", epochs=1):
            pass

    def step(self) -> float:
        """Duration of all steps of an epoch with new prompts and every batch in memory."""
        adapter = build_adapter(self._run, self.images.class_names)
        run = self._loop.start_phase(adapter.train(), "shared", self._phase)
        return seconds_of(lambda: [run.training_step(*batch) for batch in self._batches])

    def epoch(self, workers: int) -> float:
        """Duration of the epoch in `lpt-peft train`."""
        seconds: list[float] = []
        original = Loop.run

        def timed(loop: Loop, run: PhaseRun) -> None:
            seconds.append(seconds_of(lambda: original(loop, run)))

        Loop.run = timed  # type: ignore[method-assign]
        try:
            with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
                arguments = ["train", str(self.folder), "--output", output, "--backbone", self.settings.model]
                arguments += ["--no-pretrained", "--img-size", str(self.settings.img_size), "--phases", "shared"]
                arguments += [
                    "--batch-size",
                    str(self.settings.batch_size),
                    "--shared.epochs",
                    "1",
                    "--init-prompts",
                    "random",
                ]
                if lpt_peft([*arguments, "--num-workers", str(workers)]):
                    raise SystemExit("lpt-peft train failed; see above.")
        finally:
            Loop.run = original  # type: ignore[method-assign]
        return seconds[0]


def main(settings: Settings) -> None:
    """Measure and print."""
    times: dict[tuple[str, int], list[float]] = {}

    def record(name: str, workers: int, seconds: float) -> None:
        times.setdefault((name, workers), []).append(seconds)

    def least(name: str, workers: int = 0) -> float:
        return min(times[name, workers])

    with tempfile.TemporaryDirectory() as name:
        size = write_jpegs(Path(name), settings)
        benchmark = Benchmark(Path(name), settings)
        benchmark.decode()  # the files are cached from here on
        for _ in range(settings.rounds):
            record("decode", 0, seconds_of(benchmark.decode))
            record("step", 0, benchmark.step())
            for workers in settings.workers:
                record("load", workers, seconds_of(lambda workers=workers: benchmark.load(workers)))  # type: ignore[misc]
                record("epoch", workers, benchmark.epoch(workers))
    images = settings.batch_size * steps_per_epoch(settings.num_images, benchmark.training)
    plain = settings.num_images / least("decode")
    print(
        f"{settings.num_images} JPEGs of {settings.pixels} px, {size:.0f} KiB each; {settings.model} at "
        f"{settings.img_size} px; {os.cpu_count()} cores, {torch.get_num_threads()} threads; least of "
        f"{settings.rounds} rounds\n"
    )
    print(f"{'':24}{'images/s':>10}{'of decoding':>13}")
    print(f"{'Pillow, decoding alone':24}{plain:>10.0f}{1:>13.2f}")
    for workers in settings.workers:
        speed = images / least("load", workers)
        print(f"{f'loader, {workers} workers':24}{speed:>10.0f}{speed / plain:>13.2f}")
    print(f"\n{'lpt-peft train':24}{'epoch s':>10}{'loading s':>13}{'steps s':>10}{'epoch / sum':>13}")
    for workers in settings.workers:
        epoch, load, step = least("epoch", workers), least("load", workers), least("step")
        print(f"{f'{workers} workers':24}{epoch:>10.2f}{load:>13.2f}{step:>10.2f}{epoch / (load + step):>13.2f}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
