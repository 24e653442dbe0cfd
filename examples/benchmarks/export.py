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
from typing import Any, Literal

import numpy as np
import onnxruntime
import timm
import torch
import tyro

from lpt_peft import LongTailPromptAdapter
from lpt_peft.inference import ExportFormat, export_model
from lpt_peft.inference.export.formats import FILE_NAMES

NUM_CLASSES = 365


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    model: str = "vit_small_patch16_224"
    batch_size: int = 8
    phase: str = "group"
    """Phase of the adapter: "shared" or "group"."""
    query: Literal["final", "block_k"] = "final"
    rounds: int = 5
    threads: int = 1
    aoti: bool = True
    """Compile and measure an AOTInductor package as well."""
    folder: Path | None = None
    """Keep the exported files here; existing files are used again. None: a temporary folder."""


def open_onnx(file: Path, inputs: dict[str, Any], threads: int) -> Callable[[], object]:
    """Return a call of onnxruntime with these inputs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
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
    adapter = LongTailPromptAdapter.wrap(vit, NUM_CLASSES, query=settings.query).eval()
    adapter.phase = settings.phase
    _, height, width = adapter.preprocess()["input_size"]
    images = torch.randn(settings.batch_size, 3, height, width)
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary)

        def export(kind: ExportFormat, task: str | None = None) -> Path:
            label = kind if task is None else f"{kind}-{task}"
            file = folder / label / FILE_NAMES[kind]
            if not file.exists():
                start = time.perf_counter()
                export_model(adapter, folder / label, format=kind, task=task)
                print(f"{label}: written in {time.perf_counter() - start:.0f} s", flush=True)
            print(f"{label}: {file.stat().st_size / 1e6:.1f} MB", flush=True)
            return file

        compiled = torch.compile(adapter)
        program = torch.export.load(export("pt2")).module()
        swappable = export("onnx", "task")
        tensors = dict(np.load(swappable.parent / "tasks" / "task.npz"))
        print(f"tensors of a task: {sum(array.nbytes for array in tensors.values()) / 1e6:.2f} MB")
        inputs = {"images": images.numpy()}
        actions: dict[str, Callable[[], object]] = {
            "PyTorch, eager": lambda: adapter(images),
            "PyTorch, torch.compile": lambda: compiled(images),
            "torch.export program": lambda: program(images),
            "onnxruntime": open_onnx(export("onnx"), inputs, settings.threads),
            "onnxruntime, swappable": open_onnx(swappable, {**inputs, **tensors}, settings.threads),
        }
        if settings.aoti:
            package = torch._inductor.aoti_load_package(str(export("aoti")))
            actions["AOTInductor package"] = lambda: package(images)
        least = measure(actions, settings.rounds)
    print(f"{settings.model}, phase {settings.phase}, batch {settings.batch_size}, {settings.threads} threads")
    eager = least["PyTorch, eager"]
    for label, found in least.items():
        print(f"{label:26} {1000 * found / settings.batch_size:8.1f} ms per image   {found / eager:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
