"""`lpt-peft predict DIR IMAGES...`: print the classes that a trained model finds in image files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from lpt_peft._text import number, printable
from lpt_peft.cli.common.exit_codes import FAILED, INCOMPLETE, OK
from lpt_peft.cli.common.extras import requires_extra
from lpt_peft.cli.common.messages import notice, without_errno
from lpt_peft.cli.common.options import Json
from lpt_peft.cli.common.streams import dump_json
from lpt_peft.errors import ConfigError, InputError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from lpt_peft.cli.common.load_run import LoadedRun

_BATCH = 64
_SHOW = 3


def predict(
    folder: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[tuple[Path, ...]],
    /,
    show: int | None = None,
    min_probability: float = 0.0,
    as_json: Json = False,
) -> int:
    """Print the most probable classes of images; images that cannot be read are left out and named at the end.

    Args:
        folder: Output folder of `lpt-peft train`, or a prompt file or model file.
        images: Image files; - reads their paths from standard input, one per line or separated by NUL.
        show: Classes to print for each image, the most probable first; None: 3, or all of fewer.
        min_probability: Reject images whose most probable class has a lower probability; they are marked and counted.
        as_json: Print a JSON list with an object for each image: its classes, or the error of reading it.
    """
    with requires_extra("lpt-peft predict", "train"):
        from lpt_peft.cli.common.load_run import load_run
        from lpt_peft.cli.common.tables import print_table

    paths = list(_given_paths(images))
    if not paths:
        raise InputError("predict needs images: lpt-peft predict DIR IMAGE ..., or - to read paths from stdin.")
    if show is not None and show < 1:
        raise ConfigError(f"--show {show} must be at least 1.")
    if not 0 <= min_probability <= 1:
        raise ConfigError(f"--min-probability {min_probability:g} must be a probability, from 0 to 1.")
    run = load_run(folder)
    if min_probability and run.model.metadata.temperature is None:
        notice("the probabilities are not calibrated: the run had no validation split to fit a temperature on")
    num_classes = len(run.class_names)
    if show is not None and show > num_classes:
        raise ConfigError(f"--show {show} must be from 1 to {num_classes}, the number of classes.")
    failed: list[dict[str, Any]] = []
    rejected = 0
    separator = "["
    for answers in _predictions(run, paths, min(show or _SHOW, num_classes)):
        failed += [answer for answer in answers if "error" in answer]
        for answer in answers:
            if min_probability and "classes" in answer:
                answer["rejected"] = answer["classes"][0]["probability"] < min_probability
                rejected += answer["rejected"]
        if as_json:
            for answer in answers:
                print(separator, dump_json(answer), sep="\n", end="")
                separator = ","
        elif rows := [_row(answer) for answer in answers if "classes" in answer]:
            print_table(rows)
        sys.stdout.flush()  # answers before an interruption are not lost
    if as_json:
        print("\n]")
    if rejected:
        notice(
            f"{rejected} of {number(len(paths), 'image')} rejected: no class has a probability of {min_probability:g}"
        )
    if not failed:
        return OK
    print(f"lpt-peft: {len(failed)} of {len(paths)} images cannot be read and were left out:", file=sys.stderr)
    for answer in failed:
        print(printable(f"  {answer['image']}: {answer['error']}", 10_000), file=sys.stderr)
    return FAILED if len(failed) == len(paths) else INCOMPLETE


def _predictions(run: LoadedRun, paths: Sequence[Path], show: int) -> Iterator[list[dict[str, Any]]]:
    """For each batch, a dictionary per image, in order: "image" with "classes", or with "error"."""
    import torch

    from lpt_peft.data.transforms import transforms

    transform = transforms(
        run.model.preprocess(),
        train=False,
        crop_pct=run.images.crop_pct,
        exif=run.images.exif,
        background=run.images.background,
    )
    device, temperature = run.model.head.weight.device, run.model.metadata.temperature or 1.0
    for start in range(0, len(paths), _BATCH):
        answers: list[dict[str, Any]] = []
        tensors = []
        for path in paths[start : start + _BATCH]:
            tensor, error = _load(path, transform)
            answers.append({"image": str(path)} | ({"error": error} if error else {}))
            tensors += [] if tensor is None else [tensor]
        if tensors:
            with torch.no_grad():
                found = (run.model(torch.stack(tensors).to(device)).float() / temperature).softmax(1).topk(show)
            readable = (answer for answer in answers if "error" not in answer)
            for answer, probabilities, labels in zip(readable, *(part.tolist() for part in found), strict=True):
                answer["classes"] = [
                    {"class": run.class_names[label], "label": label, "probability": probability}
                    for label, probability in zip(labels, probabilities, strict=True)
                ]
        yield answers


def _load(path: Path, transform: Callable[[Image.Image], Tensor]) -> tuple[Tensor | None, str]:
    """The image as a tensor (C, H, W), or None and the reason."""
    from lpt_peft.data.files.reading import open_image

    if path.is_dir():
        return None, f"a folder; give its image files, such as {path}/*.jpg"
    try:
        return transform(open_image(path)), ""
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes
        return None, _reason(error)


def _reason(error: Exception) -> str:
    """Why an image cannot be read, without the name of a class of Python if there is a text."""
    text = (isinstance(error, OSError) and error.strerror) or without_errno(str(error)[:200])
    return text or type(error).__name__


def _given_paths(images: Sequence[Path]) -> Iterator[Path]:
    """The paths on the command line, with those of standard input in the place of "-"."""
    for path in images:
        if str(path) != "-":
            yield path
            continue
        content = sys.stdin.buffer.read()
        for name in content.split(b"\0" if b"\0" in content else b"\n"):
            if name := name.removesuffix(b"\r"):  # of lists written on Windows
                yield Path(os.fsdecode(name))


def _row(answer: dict[str, Any]) -> tuple[str, ...]:
    first, *others = map(_cell, answer["classes"])
    return (answer["image"], f"rejected ({first})" if answer.get("rejected") else first, *others)


def _cell(entry: dict[str, Any]) -> str:
    return f"{entry['class']} {entry['probability']:.1%}"
