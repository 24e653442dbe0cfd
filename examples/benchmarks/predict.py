"""Speed of `Classifier` and `lpt-peft predict` compared with the model alone, and the memory of the command.

    python examples/benchmarks/predict.py                                                   # 5,000 images of 96 px
    python examples/benchmarks/predict.py --model vit_base_patch16_224 --img-size 224 --num-images 1000

Writes small JPEGs into a temporary folder. The model alone classifies batches that are in memory, without reading,
decoding and resizing. It alternates with the classifier on blocks of images, so that other load on the machine affects
both equally, and the medians over the blocks are reported: of the time, and of the CPU seconds of all processes, which
do not depend on other load. The command then runs in a separate process on all files; its memory is read every half
second.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from _measure import device_name
from PIL import Image

from lpt_peft import Classifier, LongTailPromptAdapter
from lpt_peft.inference.run_backbone import RunBackbone

NUM_CLASSES = 100
INTERVAL = 0.5  # seconds between readings of the memory


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    num_images: int = 5000
    pixels: int = 96
    """Longer side of the JPEGs; the shorter side is three quarters of it."""
    model: str = "vit_small_patch16_224"
    img_size: int = 96
    batch_size: int = 64
    workers: tuple[int, ...] = (0, 2)
    phase: str = "group"
    """Phase of the adapter: "shared" or "group"."""
    blocks: int = 5
    block: int = 320
    """Images of a block."""
    command: bool = True
    """Also run the command on all images."""


class Sample(NamedTuple):
    """Seconds of a block, and CPU seconds of all processes."""

    seconds: float
    cpu_seconds: float


def write_jpegs(folder: Path, settings: Settings) -> list[str]:
    """Write images of a few smooth shapes and grain; return their paths."""
    generator = np.random.default_rng(0)
    size = (settings.pixels, settings.pixels * 3 // 4)
    paths = []
    for number in range(settings.num_images):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size)
        pixels = np.asarray(coarse).astype(np.int16) + generator.integers(-12, 13, (size[1], size[0], 3))
        path = folder / f"{number:06}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(str(path))
    return paths


def write_run(folder: Path, settings: Settings) -> None:
    """Write the output folder of a run with random weights."""
    backbone = RunBackbone(backbone=settings.model, pretrained=False, img_size=settings.img_size)
    adapter = LongTailPromptAdapter.wrap(backbone.build(), NUM_CLASSES)
    adapter.phase = settings.phase
    adapter.save_pretrained(folder / "prompts")
    described = {"backbone": settings.model, "pretrained": False, "img_size": settings.img_size}
    (folder / "settings.json").write_text(json.dumps(described))


def measure(action: Callable[[], object]) -> Sample:
    """Measure an action, with the processes that it started and ended."""
    before, start = os.times(), time.perf_counter()
    action()
    seconds, after = time.perf_counter() - start, os.times()
    return Sample(seconds, sum(after[:4]) - sum(before[:4]))


def compare(classifier: Classifier, paths: list[str], settings: Settings) -> dict[str, list[Sample]]:
    """Measure the model alone and the classifier on blocks of images, after a block to warm up."""
    model, device, side = classifier.model, classifier.device, settings.img_size
    images = torch.randn(settings.batch_size, 3, side, side, device=device)

    def alone(block: list[str]) -> None:
        for start in range(0, len(block), settings.batch_size):
            model(images[: len(block) - start], return_output=True).logits.tolist()

    actions: dict[str, Callable[[list[str]], object]] = {"model, images in memory": alone}
    for workers in settings.workers:
        actions[f"Classifier, {workers} workers"] = Classifier(
            model, batch_size=settings.batch_size, num_workers=workers
        )
    samples: dict[str, list[Sample]] = {name: [] for name in actions}
    for number in range(settings.blocks + 1):
        start = number * settings.block % len(paths)
        block = paths[start : start + settings.block]
        for name, action in actions.items():
            sample = measure(lambda action=action, block=block: action(block))  # type: ignore[misc]
            if number:
                samples[name].append(sample)
        print(f"block {number} of {settings.blocks}", file=sys.stderr)
    return samples


def resident_mebibytes(process: int) -> float:
    """Resident memory of a process in MiB (Linux); 0 after its end."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 0.0)


def cpu_seconds(process: int) -> float:
    """CPU seconds of a process so far (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


class CommandRun(NamedTuple):
    """Seconds until the first result of the command; time and memory in MiB from then on."""

    start: float
    sample: Sample
    memory: list[float]


def run_command(run: Path, folder: Path, total: int) -> CommandRun:
    """Run `lpt-peft predict` on a folder and read its memory every half second."""
    command = [sys.executable, "-m", "lpt_peft", "predict", str(run), str(folder), "--format", "jsonl"]
    memory: list[float] = []
    before, start = os.times(), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = iter(process.stdout or ())
        next(lines, None)
        first, cpu_start = time.perf_counter(), cpu_seconds(process.pid)
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(INTERVAL):
                memory.append(resident_mebibytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        count = 1 + sum(1 for _ in lines)
        seconds = time.perf_counter() - first
        ended.set()
        watcher.join()
    if process.returncode or count != total:
        raise SystemExit(f"lpt-peft predict failed with status {process.returncode} after {count} images.")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return CommandRun(first - start, Sample(seconds, cpu - cpu_start), [value for value in memory if value])


@torch.no_grad()
def main(settings: Settings) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        run, folder = Path(name, "run"), Path(name, "images")
        run.mkdir()
        folder.mkdir()
        paths = write_jpegs(folder, settings)
        write_run(run, settings)
        classifier = Classifier.from_pretrained(run, batch_size=settings.batch_size)
        samples = compare(classifier, paths, settings)
        print(
            f"{len(paths)} JPEGs of {settings.pixels} px; {settings.model} at {settings.img_size} px, phase "
            f"{settings.phase}; {device_name(classifier.device)}, {os.cpu_count()} cores; medians of {settings.blocks} "
            f"blocks of {settings.block} images\n"
        )
        base = samples["model, images in memory"]
        print(f"{'':30}{'images/s':>10}{'of the model':>14}{'in CPU seconds':>16}")
        for key, values in samples.items():
            rate = statistics.median(settings.block / sample.seconds for sample in values)
            share, cpu_share = (
                statistics.median(alone[field] / sample[field] for alone, sample in zip(base, values, strict=True))
                for field in range(2)
            )
            print(f"{key:30}{rate:>10.1f}{share:>14.2f}{cpu_share:>16.2f}")
        if not settings.command:
            return
        found = run_command(run, folder, len(paths))
        left, memory = len(paths) - settings.batch_size, found.memory  # the first batch is the start
        alone_cpu = statistics.median(sample.cpu_seconds for sample in base) / settings.block
        print(
            f"\nlpt-peft predict: first result after {found.start:.1f} s, then {left / found.sample.seconds:.1f} "
            f"images/s, {alone_cpu * left / found.sample.cpu_seconds:.2f} of the model in CPU seconds; memory "
            f"{memory[0]:.0f} MiB at first, {memory[len(memory) // 2]:.0f} half-way, {memory[-1]:.0f} at the end, "
            f"{max(memory):.0f} at most"
        )


if __name__ == "__main__":
    main(tyro.cli(Settings))
