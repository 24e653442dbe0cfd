"""Speed of `Classifier` compared with its model alone, and the memory of `lpt-peft predict`.

    python examples/benchmarks/predict.py                                    # 5,000 images of 96 px
    python examples/benchmarks/predict.py --num-images 500 --model vit_tiny_patch16_224

Writes small JPEGs into a temporary folder. The model alone classifies batches that are in memory, without reading,
decoding and resizing. Rounds are interleaved, and the minimum is reported, since interference only adds time. The
command then runs in a separate process on a fifth of the files, and on these files five times over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from _measure import device_name, interleaved
from PIL import Image

from lpt_peft import Classifier, LongTailPromptAdapter
from lpt_peft.inference.run_backbone import RunBackbone

REPEATS = 5
NUM_CLASSES = 100


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    num_images: int = 5000
    pixels: int = 96
    """Longer side of the JPEGs; the shorter side is three quarters of it."""
    model: str = "vit_small_patch16_224"
    img_size: int = 224
    batch_size: int = 64
    workers: tuple[int, ...] = (0, 1, 2)
    phase: str = "group"
    """Phase of the adapter: "shared" or "group"."""
    rounds: int = 1


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


def consume(predictions: Iterable[object]) -> None:
    """Iterate to the end."""
    for _ in predictions:
        pass


def run_command(run: Path, paths: list[str]) -> tuple[float, float]:
    """Run `lpt-peft predict` on a list of files; return its seconds, and its peak memory in MiB without workers."""
    words = ["predict", str(run), "-", "--format", "jsonl", "--num-workers", "0"]
    program = (
        "import resource, sys, time; from lpt_peft.cli import main; start = time.perf_counter(); "
        f"status = main({words!r}); seconds = time.perf_counter() - start; "
        "print(status, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input="\n".join(paths), capture_output=True, text=True, check=True
    )
    status, seconds, kibibytes = done.stderr.split()[-3:]
    if status != "0" or len(done.stdout.splitlines()) != len(paths):
        raise SystemExit(f"lpt-peft predict failed: {done.stderr}")
    return float(seconds), int(kibibytes) / 1024


@torch.no_grad()
def main(settings: Settings) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        (folder / "run").mkdir()
        paths = write_jpegs(folder / "images", settings)
        write_run(folder / "run", settings)
        classifier = Classifier.from_pretrained(folder / "run", batch_size=settings.batch_size)
        device = classifier.device
        batch = torch.randn(settings.batch_size, 3, settings.img_size, settings.img_size, device=device)
        sizes = [min(settings.batch_size, len(paths) - start) for start in range(0, len(paths), settings.batch_size)]
        model, vit = (
            classifier.model,
            RunBackbone(backbone=settings.model, pretrained=False, img_size=settings.img_size),
        )
        plain = vit.build().to(device)

        def stream(workers: int) -> None:
            loaded = Classifier(model, batch_size=settings.batch_size, num_workers=workers)
            consume(loaded.stream(paths))

        actions = {
            "plain ViT, images in memory": lambda: consume(plain(batch[:size]) for size in sizes),
            "model, images in memory": lambda: consume(model(batch[:size]) for size in sizes),
        }
        for workers in settings.workers:
            actions[f"Classifier, {workers} workers"] = lambda workers=workers: stream(workers)  # type: ignore[misc]
        samples = interleaved(actions, settings.rounds, device)
        times = {key: min(values) for key, values in samples.items()}
        base = times["model, images in memory"]
        print(
            f"{len(paths)} JPEGs of {settings.pixels} px; {settings.model} at {settings.img_size} px, phase "
            f"{settings.phase}; {device_name(device)}, {os.cpu_count()} cores; least of {settings.rounds} rounds\n"
        )
        print(f"{'':30}{'images/s':>10}{'of the model':>14}")
        for key, least in times.items():
            print(f"{key:30}{len(paths) / least:>10.1f}{base / least:>14.2f}")
        print(f"\n{'lpt-peft predict':30}{'images/s':>10}{'peak MiB':>14}")
        few = paths[: max(1, len(paths) // REPEATS)]
        for listed in (few, few * REPEATS):
            seconds, mebibytes = run_command(folder / "run", listed)
            print(f"{f'{len(listed)} images':30}{len(listed) / seconds:>10.1f}{mebibytes:>14.0f}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
