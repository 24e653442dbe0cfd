"""Classify millions of images on a Ray cluster; an interrupted run continues where it stopped.

    pip install "lpt_peft[examples]"
    python examples/predict_with_ray.py run photos/ predictions
    python examples/predict_with_ray.py run list.txt predictions --actors 8 --num-gpus 1 --batch-size 256
    python examples/predict_with_ray.py run "shards/*.parquet" predictions --format jsonl

The images are a folder, a text file with a path per line, or Parquet files with a column of encoded images. They are
divided into parts: `--part-size` paths, or a Parquet file. Tasks on the CPUs read, decode and resize the images of a
part; actors with a `Classifier` each, loaded once, predict; this process collects the rows of a part and writes
`part-000000.parquet` when it is complete. Files of the output folder:

    job.json        settings and parts; another run with these settings continues the job
    inputs.jsonl    paths found when the job began, so that parts stay the same; absolute
    part-*          a row per image, in the order of the input: "image", "classes" and "error" as in `lpt-peft predict`

An image that cannot be read has a row with an `error` and is counted. Parts appear under their name only when they are
complete, and a run skips parts that exist: to repeat a part, delete its file. Model, images and output folder must have
the same path on all nodes, such as on a network file system. The job runs on the cluster of `RAY_ADDRESS`, or on a
cluster that was started on this machine; without a cluster, Ray starts on this machine alone.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by ray.init: no usage statistics are sent

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
import tyro
from ray.data import ActorPoolStrategy, DataContext

from lpt_peft import Classifier
from lpt_peft.errors import ConfigError, InputError, StateError
from lpt_peft.inference import image_paths
from lpt_peft.inference.items import ItemReader

CHUNK = 64
"""Images that a task decodes before it passes them to the actors."""
PROGRESS_SECONDS = 10
JOB, INPUTS = "job.json", "inputs.jsonl"
ROW = pa.schema(
    [
        ("part", pa.int64()),
        ("position", pa.int64()),
        ("image", pa.string()),
        (
            "classes",
            pa.list_(pa.struct([("class", pa.string()), ("label", pa.int64()), ("probability", pa.float64())])),
        ),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Settings:
    """Settings of a job."""

    model: tyro.conf.Positional[str]
    """Output folder of `lpt-peft train`, a prompt file or model file, or OWNER/NAME on the Hugging Face Hub."""
    images: tyro.conf.Positional[str]
    """A folder, a text file with a path per line, or a pattern of Parquet files, which ends in .parquet."""
    output: tyro.conf.Positional[Path]
    """Folder for the predictions."""
    format: Literal["parquet", "jsonl"] = "parquet"
    show: int = 5
    """Classes of each image, the most probable first; at most those of the model."""
    part_size: int = 2000
    """Paths of a part; a part of Parquet images is a file."""
    column: str = "image"
    """Column of Parquet files: bytes, or a structure of `bytes` and `path` as in Hugging Face datasets."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Cast the ViT's weights; None: as in the training."""
    batch_size: int = 64
    actors: int = 1
    """Actors, each with a model."""
    num_gpus: float = 0
    """GPUs of an actor, such as 1 or 0.5; 0 computes on the CPU."""
    num_cpus: float = 1
    """CPUs of an actor; the others read images."""


@dataclass(frozen=True)
class Part:
    """Images of an output file.

    Attributes:
        number: Number of the part, from 0.
        source: File with the paths, or Parquet file with the images.
        begin: Offset of the first path in bytes.
        rows: Number of images.
    """

    number: int
    source: str
    begin: int
    rows: int


class Predict:
    """Actor with a `Classifier`: preprocessed images in, rows of predictions out.

    Args:
        settings: Settings of the job.
    """

    def __init__(self, settings: Settings) -> None:
        # Tensors are preprocessed here, so the warning about values from 0 to 1 does not apply.
        warnings.filterwarnings("ignore", message="Tensors of floating point")
        self.classifier = Classifier.from_pretrained(
            settings.model,
            batch_size=settings.batch_size,
            device=None if settings.num_gpus else "cpu",
            dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
        )
        self.show = min(settings.show, self.classifier.num_classes)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """Predict a batch.

        Args:
            batch: "part", "position" (B,) int64; "image", "error" (B,) text; "pixels" (B, 3, h, w) float32.

        Returns:
            A table of B rows with the columns of `ROW`.
        """
        read = batch["error"] == ""
        predictions = iter(self.classifier(torch.tensor(batch["pixels"][read]), show=self.show))
        rows = []
        for number, error in enumerate(batch["error"]):
            row = {"error": error} if error else next(predictions).to_dict()
            rows.append({**row, **{name: batch[name][number] for name in ("part", "position", "image")}})
        return pa.Table.from_pylist(rows, schema=ROW)


def main(settings: Settings, predict: Callable[..., Any] = Predict) -> dict[str, int]:
    """Run a job, or continue it.

    Args:
        settings: Settings of the job.
        predict: Class of the actors, which is called with the settings.

    Returns:
        Number of "images" and of "unreadable" images of this call, and of "skipped" images in parts that existed.

    Raises:
        InputError: The images cannot be listed.
        ConfigError: The output folder has a job with other settings.
        LPTError: The model cannot be loaded, see `Classifier.from_pretrained`.
    """
    for name in ("show", "part_size", "batch_size", "actors"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)} must be at least 1.")
    if Path(settings.model).exists():
        settings = replace(settings, model=str(Path(settings.model).absolute()))
    classifier = Classifier.from_pretrained(settings.model, device="cpu")  # reports a damaged model before Ray starts
    parts = open_job(settings, classifier)
    missing = [part for part in parts if not part_file(settings, part.number).exists()]
    total = sum(part.rows for part in missing)
    done = {"images": total, "unreadable": 0, "skipped": sum(part.rows for part in parts) - total}
    if missing:
        if not ray.is_initialized():
            ray.init(include_dashboard=False)
        warn_of_resources(settings)
        done["unreadable"] = write_parts(settings, missing, predict_parts(settings, classifier, missing, predict))
    say(f"{total:,} images, {done['unreadable']:,} of them unreadable; {done['skipped']:,} skipped")
    return done


def open_job(settings: Settings, classifier: Classifier) -> list[Part]:
    """Return the parts of a job, which are listed at its beginning.

    Raises:
        InputError: The images cannot be listed.
        ConfigError: The output folder has a job with other settings.
    """
    names = ("images", "format", "show", "part_size", "column", "dtype")
    values = {name: getattr(settings, name) for name in names}
    head = classifier.model.head.weight.detach().view(torch.uint8).numpy()  # differs between trained models
    values |= {"head": hashlib.sha256(head.tobytes()).hexdigest(), "temperature": classifier.temperature}
    file = settings.output / JOB
    if not file.exists():
        settings.output.mkdir(parents=True, exist_ok=True)
        list_parts = parquet_parts if settings.images.endswith(".parquet") else path_parts
        say(f"listing {settings.images}")
        parts = list(list_parts(settings))
        if not parts:
            raise InputError(f"{settings.images} has no image: check the path.")
        write_atomically(file, json.dumps({"settings": values, "parts": [asdict(part) for part in parts]}).encode())
        return parts
    job = json.loads(file.read_text(encoding="utf-8"))
    differences = [
        f"{name} was {job['settings'].get(name)!r:.80}" for name in values if job["settings"].get(name) != values[name]
    ]
    if differences:
        raise ConfigError(
            f"{settings.output} has a job with other settings: {', '.join(differences)}. Choose another output folder, "
            "or delete this folder."
        )
    return [Part(**part) for part in job["parts"]]


def path_parts(settings: Settings) -> Iterator[Part]:
    """Write the paths of a folder or a list to a file, and yield parts of it."""
    images = Path(settings.images)
    if images.is_dir():
        paths = image_paths(settings.images)
    elif images.is_file():
        paths = (line.rstrip("\r\n") for line in images.open(encoding="utf-8", errors="surrogateescape"))
    else:
        raise InputError(f"{settings.images} does not exist: give a folder, a list, or a pattern of Parquet files.")
    paths = (os.path.join(Path.cwd(), path) for path in paths if path)  # noqa: PTH118 - does not change the path
    target, number, begin = settings.output.absolute() / INPUTS, 0, 0
    with target.open("wb") as file:
        while part := list(islice(paths, settings.part_size)):
            yield Part(number, str(target), begin, len(part))
            begin += file.write(b"".join(json.dumps(path).encode() + b"\n" for path in part))
            number += 1


def parquet_parts(settings: Settings) -> Iterator[Part]:
    """Yield a part for each Parquet file with rows."""
    files = sorted(glob.glob(settings.images, recursive=True))  # noqa: PTH207 - an absolute pattern
    if not files:
        raise InputError(f"No file matches {settings.images}: check the path.")
    for number, file in enumerate(files):
        with reading(file), pq.ParquetFile(file) as opened:
            names, rows = opened.schema_arrow.names, opened.metadata.num_rows
        if settings.column not in names:
            raise InputError(f"{file} has the columns {', '.join(names)}: give --column NAME of the images.")
        if rows:
            yield Part(number, str(Path(file).absolute()), 0, rows)


def predict_parts(
    settings: Settings, classifier: Classifier, parts: list[Part], predict: Callable[..., Any]
) -> Iterator[pa.Table]:
    """Start the tasks and actors, and yield tables of predictions with the columns of `ROW`, in any order."""
    DataContext.get_current().enable_progress_bars = False
    read = {"reader": ItemReader(classifier.transform), "column": settings.column}
    dataset = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts))
    # An option that actors do not have, so that Ray does not move the reading into the actors.
    dataset = dataset.map_batches(read_part, batch_size=1, fn_kwargs=read, max_calls=100)
    dataset = dataset.map_batches(
        predict,
        fn_constructor_args=(settings,),
        compute=ActorPoolStrategy(size=settings.actors),
        batch_size=settings.batch_size,
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus or None,
    )
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def read_part(batch: dict[str, np.ndarray], reader: ItemReader, column: str) -> Iterator[dict[str, Any]]:
    """Read and preprocess the images of a part.

    Args:
        batch: Fields of a `Part`, each (1,).
        reader: Reads an image.
        column: Column of the images in Parquet files.

    Yields:
        "part", "position", "image", "error" and "pixels" of at most `CHUNK` images, as for `Predict`.
    """
    part = Part(**{name: values.tolist()[0] for name, values in batch.items()})
    items = parquet_items(part, column) if part.source.endswith(".parquet") else path_items(part)
    position = 0
    while chunk := list(islice(items, CHUNK)):
        names, images = zip(*chunk, strict=True)
        tensors, errors = zip(*map(reader.__getitem__, images), strict=True)
        blank = next((torch.zeros_like(tensor) for tensor in tensors if tensor is not None), None)
        if blank is None:
            blank = reader[np.zeros((8, 8, 3), np.uint8)][0]
        yield {
            "part": np.full(len(chunk), part.number),
            "position": np.arange(position, position + len(chunk)),
            # A name that is not UTF-8 cannot be a text in Arrow.
            "image": [os.fsencode(name).decode(errors="backslashreplace") for name in names],
            "error": [error or "" for error in errors],
            "pixels": torch.stack([blank if tensor is None else tensor for tensor in tensors]).numpy(),
        }
        position += len(chunk)


def path_items(part: Part) -> Iterator[tuple[str, str]]:
    """Yield the path of each image, as its name and as the image."""
    with Path(part.source).open("rb") as file:
        file.seek(part.begin)
        for line in islice(file, part.rows):
            path = json.loads(line)
            yield path, path


def parquet_items(part: Part, column: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the encoded bytes of each image."""
    row = 0
    with reading(part.source), pq.ParquetFile(part.source) as file:
        for batch in file.iter_batches(batch_size=CHUNK, columns=[column]):
            for value in batch.column(0).to_pylist():
                fields = value if isinstance(value, dict) else {"bytes": value}
                yield fields.get("path") or f"{part.source}#{row}", fields.get("bytes") or b""
                row += 1


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Name a Parquet file in the errors of reading it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read as Parquet: {error!s:.200}. Repair it, or leave it out.") from error


def write_parts(settings: Settings, parts: list[Part], tables: Iterator[pa.Table]) -> int:
    """Collect predictions, write each part when it is complete, and return the number of unreadable images.

    Raises:
        StateError: Rows are missing or repeated.
    """
    rows = {part.number: part.rows for part in parts}
    collected: dict[int, list[pa.Table]] = {number: [] for number in rows}
    total, seen, unreadable = sum(rows.values()), 0, 0
    start = shown = time.monotonic()
    for table in tables:
        if not seen:
            start = shown = time.monotonic()  # the rate does not include the start of the actors
        seen += len(table)
        unreadable += len(table) - table["error"].null_count
        for number in table["part"].unique().to_pylist():
            collected[number].append(table.filter(pc.field("part") == number))
            if sum(map(len, collected[number])) < rows[number]:
                continue
            complete = pa.concat_tables(collected.pop(number)).sort_by("position")
            if complete["position"].to_pylist() != list(range(rows[number])):
                raise StateError(f"Rows of part {number} are repeated: run the command again to compute this part.")
            write_part(settings, number, complete.drop_columns(["part", "position"]))
        if (now := time.monotonic()) - shown >= PROGRESS_SECONDS:
            shown, rate = now, seen / (now - start)
            left = (total - seen) / rate / 60
            say(f"{seen:,} of {total:,} images, {unreadable:,} unreadable, {rate:,.0f} images/s, {left:,.0f} min left")
    if collected:
        raise StateError(f"Rows of {len(collected)} parts are missing: run the command again to compute these parts.")
    return unreadable


def part_file(settings: Settings, number: int) -> Path:
    """Output file of a part."""
    return settings.output / f"part-{number:06}.{settings.format}"


def write_part(settings: Settings, number: int, table: pa.Table) -> None:
    """Write "image", "classes" and "error" of a part."""
    if settings.format == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        data = sink.getvalue().to_pybytes()
    else:
        rows = ({name: value for name, value in row.items() if value is not None} for row in table.to_pylist())
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    write_atomically(part_file(settings, number), data)


def write_atomically(file: Path, data: bytes) -> None:
    """Write a file that is complete whenever it exists."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(file)


def warn_of_resources(settings: Settings) -> None:
    """Print a remark if the cluster is too small for the actors and a task that reads."""
    found = ray.cluster_resources()
    needed = {"CPU": settings.actors * settings.num_cpus + 1, "GPU": settings.actors * settings.num_gpus}
    for name, count in needed.items():
        if found.get(name, 0) < count:
            say(
                f"warning: the actors and a task that reads need {count:g} {name}s, and the cluster has "
                f"{found.get(name, 0):g}. Ray waits until it grows: give fewer --actors, or less --num-{name.lower()}s."
            )


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
