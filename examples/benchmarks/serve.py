"""Compares `examples/serve.py` with loops that swap the prompts of a single adapter, for requests of random tasks.

    python examples/benchmarks/serve.py                               # ViT-S/16 at 224 px, 8 tasks
    OMP_NUM_THREADS=1 python examples/benchmarks/serve.py --model vit_base_patch16_224

Every row answers the same JPEG files, each for a task drawn at random, and decodes and preprocesses them. "Adapter"
rows run in this process, "server" rows in a server that `clients` threads of this process ask over HTTP. CPU seconds
are those of the process that answers, so that other load on the machine and the clients do not count; images per second
are by the clock. Rounds are interleaved after a warm-up round, and medians are reported. Linux only.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from _measure import device_name
from PIL import Image
from torch import Tensor, nn

from lpt_peft import LongTailPromptAdapter, PromptBank
from lpt_peft.data import open_image, transforms
from lpt_peft.inference.run_backbone import RunBackbone

SERVER = Path(__file__).parents[1] / "serve.py"
Requests = Sequence[tuple[str, bytes]]
"""Name of the task and content of the image file."""
Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    model: str = "vit_small_patch16_224"
    img_size: int = 224
    tasks: int = 8
    requests: int = 96
    clients: int = 32
    batch_size: int = 32
    pixels: int = 500
    """Longer side of the JPEGs."""
    rounds: int = 3


@dataclass
class Row:
    """A way of answering all requests."""

    answer: Callable[[Requests], object]
    cpu_seconds: Callable[[], float] = time.process_time
    """Clock of the process that answers."""


@torch.no_grad()
def main(settings: Settings) -> dict[str, tuple[float, float]]:
    """Measure and print; returns images per second and CPU milliseconds per image of each row."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as servers:
        folder = Path(temporary)
        backbone = write_tasks(folder, settings)
        names = [f"task{number}" for number in range(settings.tasks)]
        requests = random_requests(names, settings)
        adapter = LongTailPromptAdapter.from_pretrained(folder / names[0], backbone.build())
        transform = transforms(adapter.preprocess(), train=False)
        bank = PromptBank(backbone.build(), capacity=settings.tasks)
        for name in names:
            bank.add(name, folder / name)
        batch = settings.batch_size
        rows = {
            "adapter, a task without swaps": Row(partial(answer_by_adapter, adapter, transform, None, 1)),
            "adapter, swaps, an image at a time": Row(partial(answer_by_adapter, adapter, transform, folder, 1)),
            f"adapter, swaps, {batch} sorted by task": Row(
                partial(answer_by_adapter, adapter, transform, folder, batch)
            ),
            f"bank, batches of {batch}": Row(partial(answer_by_bank, bank, transform, batch)),
        }
        for size in (1, batch):
            port, cpu_seconds = servers.enter_context(server(folder, names, size))
            rows[f"server, --max-batch {size}"] = Row(partial(over_http, port, settings.clients), cpu_seconds)
        samples = measure(rows, requests, settings.rounds)
        changes = {
            "load_prompts": cpu_milliseconds(adapter.load_prompts, [folder / name for name in names]),
            "bank.replace": cpu_milliseconds(partial(bank.replace, names[0]), [folder / name for name in names[1:]]),
        }
    print(
        f"{settings.model} at {settings.img_size} px, {settings.tasks} tasks, {settings.requests} JPEGs of "
        f"{settings.pixels} px, {settings.clients} clients; {device_name(torch.device('cpu'))}, "
        f"load {os.getloadavg()[0]:.1f}\n\n{'':40}{'images/s':>10}{'CPU ms per image':>20}{'of the first row':>20}"
    )
    first = next(iter(samples.values()))[1]
    for name, (speed, cpu) in samples.items():
        print(f"{name:40}{speed:>10.1f}{cpu:>20.1f}{cpu / first:>20.2f}")
    print("\n" + "\n".join(f"{name}: {value:.1f} ms of CPU time" for name, value in changes.items()))
    return samples


def write_tasks(folder: Path, settings: Settings) -> RunBackbone:
    """Write a prompt file per task, and the settings that describe the ViT as those of a run."""
    backbone = RunBackbone(backbone=settings.model, pretrained=False, img_size=settings.img_size)
    vit: nn.Module = backbone.build()
    for number in range(settings.tasks):
        adapter = LongTailPromptAdapter.wrap(vit, 100)
        adapter.phase = "group"
        adapter.save_pretrained(folder / f"task{number}")
        vit = adapter.unwrap()
    (folder / "run").mkdir()
    described = {"backbone": settings.model, "pretrained": False, "img_size": settings.img_size}
    (folder / "run" / "settings.json").write_text(json.dumps(described))
    (folder / "run" / "prompts").symlink_to(folder / "task0")
    return backbone


def random_requests(names: Sequence[str], settings: Settings) -> Requests:
    """JPEGs of a few smooth shapes, each for a random task."""
    generator, rng, found = np.random.default_rng(0), random.Random(0), []
    for _ in range(settings.requests):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((settings.pixels, settings.pixels * 3 // 4)).save(file, "jpeg", quality=90)
        found.append((rng.choice(names), file.getvalue()))
    return found


def answer_by_adapter(
    adapter: LongTailPromptAdapter, transform: Transform, folder: Path | None, batch_size: int, requests: Requests
) -> None:
    """Collect batches, and answer the images of a task at a time; `folder` has the prompts, None swaps none."""
    loaded = ""
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        for task in dict.fromkeys(task for task, _ in batch):
            if folder is not None and task != loaded:
                adapter.load_prompts(folder / task)
                loaded = task
            adapter(torch.stack([transform(open_image(data)) for name, data in batch if name == task])).softmax(1)


def answer_by_bank(bank: PromptBank, transform: Transform, batch_size: int, requests: Requests) -> None:
    """Collect batches, and answer each with a bank."""
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        images = torch.stack([transform(open_image(data)) for _, data in batch])
        for result in bank(images, [task for task, _ in batch]):
            result.probabilities.topk(5)


def over_http(port: int, clients: int, requests: Requests) -> None:
    """Ask a server from several threads, each with a connection."""
    waiting, failed = iter(requests), []
    lock = threading.Lock()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while True:
            with lock:
                task, data = next(waiting, ("", b""))
            if not task:
                return connection.close()
            connection.request("POST", f"/tasks/{task}", data)
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                failed.append(response.status)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SystemExit(f"The server answered {failed[:5]}.")


@contextmanager
def server(folder: Path, names: Sequence[str], max_batch: int) -> Iterator[tuple[int, Callable[[], float]]]:
    """Run a server; yields its port and the clock of its CPU time."""
    words = [sys.executable, str(SERVER), *(f"{name}={folder / name}" for name in names)]
    words += ["--backbone", str(folder / "run"), "--max-batch", str(max_batch), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None  # noqa: S101 - narrows the type
        found = re.search(r":(\d+)$", process.stdout.readline())
        if found is None:
            raise SystemExit("The server did not start.")
        yield int(found[1]), partial(cpu_seconds_of, process.pid)
        process.terminate()


def cpu_milliseconds(change: Callable[[Path], object], sources: Sequence[Path]) -> float:
    """Median CPU milliseconds of a change to the prompts of each folder."""
    taken = []
    for source in sources:
        start = time.process_time()
        change(source)
        taken.append(1000 * (time.process_time() - start))
    return statistics.median(taken)


def cpu_seconds_of(process: int) -> float:
    """CPU seconds of another process with all its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(rows: dict[str, Row], requests: Requests, rounds: int) -> dict[str, tuple[float, float]]:
    """Images per second and CPU milliseconds per image of each row, medians over the rounds."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, row in rows.items():
            clock, cpu = time.perf_counter(), row.cpu_seconds()
            row.answer(requests[: len(requests) if number else len(requests) // 3])
            if number:
                seconds = time.perf_counter() - clock
                milliseconds = 1000 * (row.cpu_seconds() - cpu) / len(requests)
                samples[name].append((len(requests) / seconds, milliseconds))
                print(f"round {number} of {rounds}, {name}: {milliseconds:.1f} ms of CPU time", file=sys.stderr)
    return {
        name: (statistics.median(speeds), statistics.median(times))
        for name, taken in samples.items()
        for speeds, times in [zip(*taken, strict=True)]
    }


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
