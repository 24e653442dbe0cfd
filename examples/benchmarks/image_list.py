"""Time and memory from a list of half a million images to the first step of training, at the size of iNaturalist 2018.

    python examples/benchmarks/image_list.py

Writes the lists into a temporary folder and reads each in a new process. "List" is the resident memory of the dataset,
"peak" the maximum while it was built, both beyond the imports. The last lines are `lpt-peft train` on the image list,
with a ViT-S of random weights and a head of 8,142 classes, up to the end of its first step, by stage.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _measure import resident_bytes
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder  # noqa: F401 - counted among the imports

from lpt_peft.cli.common.build_adapter import build_adapter
from lpt_peft.cli.common.open_data import open_splits, set_transforms
from lpt_peft.cli.common.run_settings import ImageSettings, RunSettings
from lpt_peft.data.folder import image_folder
from lpt_peft.data.image_list import image_list
from lpt_peft.data.images import LabelledImages
from lpt_peft.data.inaturalist import inaturalist
from lpt_peft.recipe import TrainSettings, train
from lpt_peft.recipe.training.phase import PhaseRun
from lpt_peft.samplers import DualSampler


def resident() -> float:
    """Resident memory of this process in MB."""
    return resident_bytes() / 1e6


def peak() -> float:
    """Peak resident memory of this process in MB."""
    return resident_bytes(peak=True) / 1e6


def write_lists(folder: Path, num_images: int, num_classes: int) -> None:
    """Write an image list and an iNaturalist JSON with the same paths, which have realistic lengths."""
    generator = np.random.default_rng(0)
    weights = 500.0 ** -np.linspace(0, 1, num_classes)
    remaining = generator.choice(num_classes, num_images - num_classes, p=weights / weights.sum())
    labels = generator.permutation(np.concatenate([np.arange(num_classes), remaining])).tolist()
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
    """Write empty files in class folders, to measure listing them."""
    for label in range(num_classes):
        directory = folder / "folders" / f"class {label:05}"
        directory.mkdir(parents=True)
        for index in range(num_images // num_classes):
            (directory / f"{label:016x}{index:016x}.jpg").touch()


def measure(kind: str, folder: Path, results: Any) -> None:
    """In a new process: build the dataset and draw a batch of indices."""
    before, start = resident(), time.perf_counter()
    data: LabelledImages
    if kind == "image list":
        data = image_list(folder / "list.txt", folder)
    elif kind == "iNaturalist JSON":
        data = inaturalist(folder / "train2018.json", folder)
    else:
        data = image_folder(folder / "folders")
    built, maximum, now = time.perf_counter() - start, peak(), resident()
    next(iter(DualSampler(data.labels, 256)))
    drawn = time.perf_counter() - start - built
    results.put((len(data), len(data.class_names), built, drawn, now - before, maximum - before))


class Decoding(Dataset[Any]):
    """The same images; measures the time of reading and cropping."""

    def __init__(self, images: LabelledImages) -> None:
        self.images, self.seconds = images, 0.0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        start = time.perf_counter()
        item = self.images[index]
        self.seconds += time.perf_counter() - start
        return item


class FirstStepError(Exception):
    """Ends the measurement after the first step."""


def write_images(folder: Path, batch_size: int) -> None:
    """Write the files of the list that the first step reads."""
    data = image_list(folder / "list.txt", folder)
    names = [line.rsplit(" ", 1)[0] for line in (folder / "list.txt").read_text().splitlines()]
    settings = TrainSettings(batch_size=batch_size)
    sampler = DualSampler(data.labels, batch_size, samples_per_class=settings.samples_per_class)
    pixels = np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8)
    for index in {0, *next(iter(sampler))}:  # the first image is checked before
        (folder / names[index]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / names[index])


def measure_start(folder: Path, batch_size: int, results: Any) -> None:
    """In a new process: time and memory up to the end of the first step."""
    marks = [("imports", time.perf_counter(), resident())]
    run = RunSettings(
        backbone="vit_small_patch16_224",
        pretrained=False,
        images=ImageSettings(root=folder),
        training=TrainSettings(  # without a pass over images, and decoding is measured in this process
            phases="shared", init_prompts="random", batch_size=batch_size, num_workers=0
        ),
    )
    splits = open_splits(str(folder / "list.txt"), run.images, 0)
    marks.append(("list read", time.perf_counter(), resident()))
    adapter = build_adapter(run, splits["train"].class_names)
    set_transforms(splits, adapter.backbone.preprocess(), run.images)
    marks.append(("ViT built and wrapped", time.perf_counter(), resident()))
    data, step = Decoding(splits["train"]), PhaseRun.training_step

    def advance(*args: Any) -> None:
        marks.append(("ready for the first step", time.perf_counter(), resident()))
        step(*args)
        marks.append(("first step done", time.perf_counter(), resident()))
        raise FirstStepError

    PhaseRun.training_step = advance  # type: ignore[method-assign]
    try:
        about = splits["train"].about()  # as `fit` does
        labels = splits["train"].labels
        train(adapter, data, labels, run.training, checkpoints=folder / "checkpoints", about=about, progress=False)
    except FirstStepError:
        results.put((marks, data.seconds, peak()))


def print_start(folder: Path, batch_size: int = 32) -> None:
    """Measure the start of training and print the result."""
    write_images(folder, batch_size)
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(target=measure_start, args=(folder, batch_size, results))
    process.start()
    marks, decoding, maximum = results.get()
    process.join()
    (_, begin, base), *marks = marks
    print(f"\n{'start of training':26}{'s, in all':>10}{'resident MB':>13}")
    for name, moment, size in marks:
        print(f"{name:26}{moment - begin:>10.2f}{size - base:>13.0f}")
    print(f"of which decoding images {decoding:.2f} s; peak {maximum - base:.0f} MB")


def main(num_images: int = 500_000, num_classes: int = 8_142) -> None:
    print(f"{'':18}{'images':>10}{'classes':>9}{'build s':>9}{'first batch s':>15}{'list MB':>9}{'peak MB':>9}")
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_lists(folder, num_images, num_classes)
        write_folders(folder, num_images // 10, num_classes // 10)  # a tenth, since writing files is slow
        for kind in ("image list", "iNaturalist JSON", "class folders"):
            results = spawn.Queue()
            process = spawn.Process(target=measure, args=(kind, folder, results))
            process.start()
            images, classes, built, drawn, kept, maximum = results.get()
            process.join()
            print(f"{kind:18}{images:>10,}{classes:>9,}{built:>9.2f}{drawn:>15.2f}{kept:>9.0f}{maximum:>9.0f}")
        print_start(folder)


if __name__ == "__main__":
    sys.exit(main())
