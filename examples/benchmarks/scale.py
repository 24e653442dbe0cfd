"""Memory of samplers, paths and labels for many images, CPU time to read and classify an image, and cost of a million.

    python examples/benchmarks/scale.py                            # 16 million images, 4 million paths
    python examples/benchmarks/scale.py --no-memory                # the CPU times and the costs alone

Every object is built in a new process. Memory is resident memory in bytes per image, beyond that before the object was
built: the object itself, and the peak while it was built and while the first index was drawn. "Copied by a worker" is
the memory that a forked process copies when it reads all items, as a worker of a DataLoader does over an epoch: reading
a Python object writes its reference count. CPU times are those of one thread, medians over images or batches. The costs
follow from the times of docs/benchmarks.md and from assumed prices.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import tyro
from _measure import resident_bytes
from PIL import Image
from torch.utils.data import DistributedSampler, RandomSampler, WeightedRandomSampler

from lpt_peft import ClassBalancedSampler, DualSampler, LongTailPromptAdapter
from lpt_peft.data.files.path_list import PathList
from lpt_peft.data.transforms import transforms
from lpt_peft.inference.items import ItemReader
from lpt_peft.inference.run_backbone import RunBackbone

PLAIN, SHARED, FINAL, BLOCK_K = "plain ViT", "phase shared", "phase group, query final", "phase group, query block_k"
H200 = {
    "bf16 weights": (12.11, {PLAIN: 1.0, SHARED: 1.14, FINAL: 1.63}),
    "bf16 autocast, compiled": (12.18, {PLAIN: 1.0, SHARED: 1.04, FINAL: 1.56}),
    "float32": (102.92, {PLAIN: 1.0, SHARED: 1.03, FINAL: 1.54}),
}
"""Milliseconds of the plain ViT-B/16 for 128 images of 224 px on an H200, and ratios: docs/benchmarks.md."""


@dataclass
class Settings:
    """Settings of the measurement."""

    num_images: int = 16_000_000
    """Images of labels and samplers; paths are those of a quarter. `WeightedRandomSampler` allows 2^24."""
    num_classes: int = 10_000
    memory: bool = True
    """Measure memory."""
    model: str = "vit_small_patch16_224"
    """ViT of the CPU times, with random weights."""
    img_size: int = 224
    batch_size: int = 8
    pixels: int = 500
    """Longer side of the JPEGs."""
    rounds: int = 10
    """Images to read, and batches to classify; 0 measures no CPU time and computes no costs."""
    gpu_price: float = 4.0
    """Assumed price of a GPU for an hour."""
    core_price: float = 0.04
    """Assumed price of a CPU core for an hour."""


def path(index: int) -> str:
    """A path of realistic length: 60 characters."""
    return f"train/n{index % 10_000:08}/{index * 0x9E3779B97F4A7C15 % 2**160:040x}.jpg"


def labels_of(settings: Settings) -> np.ndarray:
    """Labels (N,) int64, uniform."""
    return np.random.default_rng(0).integers(0, settings.num_classes, settings.num_images)


def path_list(settings: Settings) -> PathList:
    """Paths as the datasets of lpt_peft keep them."""
    paths = PathList()
    for index in range(settings.num_images):
        paths.append(path(index))
    return paths


def arrow_file(settings: Settings) -> Any:
    """Paths in a memory-mapped file, as in Hugging Face datasets."""
    size = 100_000
    file = Path(tempfile.gettempdir(), f"paths-{os.getpid()}.arrow")
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("path", pa.string())])) as writer:
        for start in range(0, settings.num_images, size):
            writer.write(pa.record_batch([[path(start + index) for index in range(size)]], ["path"]))
    with file.open("rb+") as written:
        os.fsync(written)  # pages that are not on the disk yet count as memory of this process
    pa.default_memory_pool().release_unused()
    column = pa.ipc.open_file(pa.memory_map(str(file))).read_all()["path"]
    file.unlink()  # the mapping keeps the content
    return column


BUILDERS: dict[str, Callable[[Settings], Any]] = {
    "labels: list of int": lambda settings: labels_of(settings).tolist(),
    "labels: array of int64": labels_of,
    "labels: array of uint16": lambda settings: labels_of(settings).astype(np.uint16),
    "paths: list of str": lambda settings: [path(index) for index in range(settings.num_images)],
    "paths: list of (str, int)": lambda settings: [(path(index), index % 1000) for index in range(settings.num_images)],
    "paths: array of str (U60)": lambda settings: np.array([path(index) for index in range(settings.num_images)]),
    "paths: PathList": path_list,
    "paths: memory-mapped Arrow file": arrow_file,
    "RandomSampler": lambda settings: RandomSampler(range(settings.num_images)),
    "DistributedSampler, 8 ranks": lambda settings: DistributedSampler(range(settings.num_images), 8, 0),  # type: ignore[arg-type]
    "WeightedRandomSampler": lambda settings: WeightedRandomSampler(
        torch.ones(settings.num_images, dtype=torch.double), settings.num_images
    ),
    "ClassBalancedSampler": lambda settings: ClassBalancedSampler(labels_of(settings)),
    "DualSampler": lambda settings: DualSampler(labels_of(settings), 256),
}
READ_BY_WORKERS = [name for name in BUILDERS if name.startswith(("labels", "paths"))]


def copied_by_reading(items: Any) -> int:
    """Bytes that a forked process copies while it reads all items."""

    def private() -> int:
        rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in rollup if line.startswith("Private_Dirty"))

    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        before = private()
        for index in range(len(items)):
            item = items[index]
            item = item[0] if isinstance(item, tuple) else item
        os.write(writer, str(private() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(reader, 100))


def measure(name: str, settings: Settings, results: Any) -> None:
    """In a new process: build an object, draw its first index, and report bytes and seconds."""
    given = labels_of(settings) if name in ("ClassBalancedSampler", "DualSampler") else None  # not counted
    before, start = resident_bytes(), time.process_time()
    built = BUILDERS[name](settings) if given is None else _sampler(name, given)
    seconds, kept, peak = time.process_time() - start, resident_bytes(), resident_bytes(peak=True)
    drawing = copied = None
    if name in READ_BY_WORKERS:
        copied = copied_by_reading(built)
    else:
        start = time.process_time()
        iterator = iter(built)
        next(iterator)
        drawing, kept, peak = time.process_time() - start, resident_bytes(), resident_bytes(peak=True)
    results.put((kept - before, peak - before, copied, seconds, drawing))


def _sampler(name: str, labels: np.ndarray) -> ClassBalancedSampler | DualSampler:
    return ClassBalancedSampler(labels) if name == "ClassBalancedSampler" else DualSampler(labels, 256)


def measure_memory(settings: Settings) -> dict[str, tuple[int, int, int | None, float, float | None]]:
    """Bytes and seconds of all objects."""
    spawn = multiprocessing.get_context("spawn")
    found = {}
    print("Bytes per image; seconds of CPU time")
    print("| | kept | peak | copied by a worker | kept for 10^8 | build, s | first index, s |\n" + "|---" * 7 + "|")
    for name in BUILDERS:
        results = spawn.Queue()
        count = settings.num_images // (4 if name.startswith("paths") else 1)
        process = spawn.Process(target=measure, args=(name, replace(settings, num_images=count), results))
        process.start()
        found[name] = results.get()
        process.join()
        kept, peak, copied, seconds, drawing = found[name]
        per_image = [f"{value / count:.1f}" for value in (kept, peak, copied) if value is not None]
        times = f"{seconds:.1f} | {'' if drawing is None else f'{drawing:.2f}'}"
        gigabytes = f"{kept / count / 10:.1f} GB"
        print(
            f"| {name} | {' | '.join(per_image)} | {'| ' if copied is None else ''}{gigabytes} | {times} |", flush=True
        )
    return found


def jpegs(settings: Settings) -> list[bytes]:
    """Photo-like JPEGs: smooth shapes and grain."""
    generator, found = np.random.default_rng(0), []
    size = (settings.pixels, settings.pixels * 3 // 4)
    for _ in range(settings.rounds):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size)
        pixels = np.asarray(coarse).astype(np.int16) + generator.integers(-12, 13, (size[1], size[0], 3))
        buffer = BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


@torch.no_grad()
def measure_cpu(settings: Settings) -> dict[str, float]:
    """CPU milliseconds per image: reading, and the forward pass of the plain ViT and of both phases."""
    torch.set_num_threads(1)
    backbone = RunBackbone(backbone=settings.model, pretrained=False, img_size=settings.img_size)
    plain = backbone.build()
    models: dict[str, Any] = {PLAIN: plain}
    options: dict[str, dict[str, Any]] = {SHARED: {}, FINAL: {"query": "final"}, BLOCK_K: {"query": "block_k"}}
    for name, query in options.items():
        models[name] = LongTailPromptAdapter.wrap(backbone.build(), 100, **query).eval()
        models[name].phase = "shared" if name == SHARED else "group"
    images = torch.randn(settings.batch_size, 3, settings.img_size, settings.img_size)
    files = jpegs(settings)
    reader = ItemReader(transforms(models[SHARED].preprocess(), train=False))
    calls: dict[str, list[Callable[[], Any]]] = {"read": [lambda file=file: reader[file] for file in files]}
    calls |= {name: [lambda model=model: model(images)] * settings.rounds for name, model in models.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, settings.rounds):  # interleaved; round -1 warms up
        for name, actions in calls.items():
            start = time.process_time()
            actions[number]()
            if number >= 0:
                count = 1 if name == "read" else settings.batch_size
                samples[name].append(1000 * (time.process_time() - start) / count)
    found = {name: statistics.median(times) for name, times in samples.items()}
    ratios = {name: statistics.median(_ratios(samples[name], samples[PLAIN])) for name in samples}
    kib = statistics.mean(map(len, files)) / 1024
    files_are = f"JPEGs of {settings.pixels} px, {kib:.0f} KiB"
    print(f"\n{settings.model} at {settings.img_size} px, float32; {files_are}; one thread")
    print("| | CPU ms per image | ratio to the plain ViT |\n|---|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.2f} | {ratios[name]:.2f} |")
    return found


def cost_rows(settings: Settings, cpu: dict[str, float]) -> list[str]:
    """Rows of a table: images per second of a GPU, price of a million images, cores that read for it, and their price.

    Args:
        settings: Prices.
        cpu: CPU milliseconds per image, of `measure_cpu`.
    """
    reading = cpu["read"] / 1000 * 1e6 / 3600 * settings.core_price
    rows = []
    for precision, (milliseconds, ratios) in H200.items():
        for name, ratio in ratios.items():
            rate = 128 / (milliseconds * ratio / 1000)
            price = 1e6 / rate / 3600 * settings.gpu_price
            cores = rate * cpu["read"] / 1000
            rows.append(
                f"| H200, ViT-B, {precision}, {name} | {rate:,.0f} | {price:.2f} | {cores:.0f} | {reading:.2f} |"
            )
    for name in (PLAIN, SHARED, FINAL, BLOCK_K):
        price = cpu[name] / 1000 * 1e6 / 3600 * settings.core_price
        share = cpu["read"] / cpu[name]
        rows.append(
            f"| CPU core, ViT-S, float32, {name} | {1000 / cpu[name]:.1f} | {price:.2f} | {share:.2f} | {reading:.2f} |"
        )
    return rows


def _ratios(times: Iterable[float], base: Iterable[float]) -> list[float]:
    return [first / second for first, second in zip(times, base, strict=True)]


def main(settings: Settings) -> None:
    """Measure and print."""
    if settings.memory:
        measure_memory(settings)
    if settings.rounds:
        rows = cost_rows(settings, measure_cpu(settings))
        print(f"\nPrices for an hour: GPU {settings.gpu_price}, CPU core {settings.core_price}")
        print("| | images/s | price of a million | cores that read | price of reading |\n" + "|---" * 5 + "|")
        print("\n".join(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
