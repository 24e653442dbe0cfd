"""Speed of exported files compared with the model in PyTorch, on the CPU.

    python examples/benchmarks/export.py                                  # ViT-S at 224 px
    python examples/benchmarks/export.py --model vit_tiny_patch16_224 --batch-size 1 --no-aoti

Exports an adapter with random weights and runs every file on the same images. Rounds are interleaved. A time is the
least CPU time of a round, since interference only adds time; all runtimes use the same number of threads.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
import tyro

from lpt_peft import LongTailPromptAdapter
from lpt_peft.inference import ExportFormat, ExportResult, export_model

NUM_CLASSES = 365


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    model: str = "vit_small_patch16_224"
    batch_size: int = 8
    phase: str = "group"
    """Phase of the adapter: "shared" or "group"."""
    rounds: int = 5
    threads: int = 1
    aoti: bool = True
    """Compile and measure an AOTInductor package as well."""


def open_onnx(result: ExportResult, images: torch.Tensor, threads: int) -> Callable[[], object]:
    """Return a call of onnxruntime, with the tensors of the task if the file has exchangeable tasks."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(result.file), options, providers=["CPUExecutionProvider"])
    inputs = {"images": images.numpy()}
    for name in result.tasks:
        inputs |= dict(np.load(result.file.parent / "tasks" / f"{name}.npz"))
    return lambda: session.run(["probabilities"], inputs)


def measure(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least CPU seconds of each action in interleaved rounds, after a round that compiles."""
    least = dict.fromkeys(actions, float("inf"))
    for number in range(rounds + 1):
        for name, action in actions.items():
            start = time.process_time()
            action()
            used = time.process_time() - start
            if number:
                least[name] = min(least[name], used)
        print(f"round {number} of {rounds}", flush=True)
    return least


@torch.no_grad()
def main(settings: Settings) -> None:
    """Export, measure and print a table."""
    torch.set_num_threads(settings.threads)
    vit = timm.create_model(settings.model, num_classes=0).eval()
    adapter = LongTailPromptAdapter.wrap(vit, NUM_CLASSES).eval()
    adapter.phase = settings.phase
    _, height, width = adapter.preprocess()["input_size"]
    images = torch.randn(settings.batch_size, 3, height, width)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def export(kind: ExportFormat, label: str, task: str | None = None) -> ExportResult:
            start = time.perf_counter()
            result = export_model(adapter, folder / label, format=kind, task=task)
            megabytes = result.file.stat().st_size / 1e6
            print(f"{label}: written in {time.perf_counter() - start:.0f} s, {megabytes:.1f} MB", flush=True)
            return result

        compiled = torch.compile(adapter)
        program = torch.export.load(export("pt2", "torch.export").file).module()
        actions: dict[str, Callable[[], object]] = {
            "PyTorch, eager": lambda: adapter(images),
            "PyTorch, torch.compile": lambda: compiled(images),
            "torch.export program": lambda: program(images),
            "onnxruntime": open_onnx(export("onnx", "ONNX"), images, settings.threads),
        }
        swappable = export("onnx", "ONNX, swappable", "task")
        actions["onnxruntime, swappable"] = open_onnx(swappable, images, settings.threads)
        task = swappable.file.parent / "tasks" / "task.npz"
        print(f"tensors of a task: {task.stat().st_size / 1e6:.2f} MB")
        if settings.aoti:
            package = torch._inductor.aoti_load_package(str(export("aoti", "AOTInductor").file))
            actions["AOTInductor package"] = lambda: package(images)
        least = measure(actions, settings.rounds)
    print(f"{settings.model}, phase {settings.phase}, batch {settings.batch_size}, {settings.threads} threads")
    eager = least["PyTorch, eager"]
    for label, found in least.items():
        print(f"{label:26} {1000 * found / settings.batch_size:8.1f} ms per image   {found / eager:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
