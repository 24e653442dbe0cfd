"""Time and memory from a list of half a million images to the first batch's indices, at the size of iNaturalist 2018.

    python examples/benchmarks/image_list.py

Writes the lists into a temporary folder, and reads each in a process of its own. "List" is the resident memory that the
dataset takes and keeps, "peak" the most while it was made, both besides what the imports take. No image is decoded.
Not a test: nothing here fails.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import ImageFolder  # noqa: F401 - imported so that it counts as an import

from lpt_peft.data.folder import image_folder
from lpt_peft.data.image_list import image_list
from lpt_peft.data.images import LabelledImages
from lpt_peft.data.inaturalist import inaturalist
from lpt_peft.samplers import DualSampler


def resident() -> float:
    """Megabytes resident in this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def peak() -> float:
    """The most megabytes that were ever resident here; getrusage would count those of the process that started this."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


def write_lists(folder: Path, num_images: int, num_classes: int) -> None:
    """An image list and an iNaturalist JSON over the same paths; names as long as the real ones."""
    generator = np.random.default_rng(0)
    weights = 500.0 ** -np.linspace(0, 1, num_classes)
    rest = generator.choice(num_classes, num_images - num_classes, p=weights / weights.sum())
    labels = generator.permutation(np.concatenate([np.arange(num_classes), rest])).tolist()
    names = [f"train_val2018/Plantae/{label}/{generator.bytes(16).hex()}.jpg" for label in labels]
    with (folder / "list.txt").open("w") as lines:
        lines.writelines(f"{name} {label}\n" for name, label in zip(names, labels, strict=True))
    author = {"license": 3, "rights_holder": "A. Person", "width": 800, "height": 600}
    content = {
        "images": [{"id": index, "file_name": name, **author} for index, name in enumerate(names)],
        "categories": [{"id": label, "name": str(label), "supercategory": "Plantae"} for label in range(num_classes)],
        "annotations": [{"id": index, "image_id": index, "category_id": label} for index, label in enumerate(labels)],
    }
    (folder / "train2018.json").write_text(json.dumps(content))


def write_folders(folder: Path, num_images: int, num_classes: int) -> None:
    """Empty files in class folders: what is measured is the walk."""
    for label in range(num_classes):
        place = folder / "folders" / f"class {label:05}"
        place.mkdir(parents=True)
        for index in range(num_images // num_classes):
            (place / f"{label:016x}{index:016x}.jpg").touch()


def measure(kind: str, folder: Path, results: Any) -> None:
    """In a process of its own: build the dataset and draw one batch of indices."""
    before, start = resident(), time.perf_counter()
    data: LabelledImages
    if kind == "image list":
        data = image_list(folder / "list.txt", folder)
    elif kind == "iNaturalist JSON":
        data = inaturalist(folder / "train2018.json", folder)
    else:
        data = image_folder(folder / "folders")
    built, most, now = time.perf_counter() - start, peak(), resident()
    next(iter(DualSampler(data.labels, 128)))
    drawn = time.perf_counter() - start - built
    results.put((len(data), len(data.class_names), built, drawn, now - before, most - before))


def main(num_images: int = 500_000, num_classes: int = 8_142) -> None:
    print(f"{'':18}{'images':>10}{'classes':>9}{'build s':>9}{'first batch s':>15}{'list MB':>9}{'peak MB':>9}")
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_lists(folder, num_images, num_classes)
        write_folders(folder, num_images // 10, num_classes // 10)  # a tenth: files take their time to write
        for kind in ("image list", "iNaturalist JSON", "class folders"):
            results = spawn.Queue()
            process = spawn.Process(target=measure, args=(kind, folder, results))
            process.start()
            images, classes, built, drawn, kept, most = results.get()
            process.join()
            print(f"{kind:18}{images:>10,}{classes:>9,}{built:>9.2f}{drawn:>15.2f}{kept:>9.0f}{most:>9.0f}")


if __name__ == "__main__":
    sys.exit(main())
