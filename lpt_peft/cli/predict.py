"""`lpt-peft predict MODEL IMAGES...`: print the classes that a trained model finds in image files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lpt_peft._text import number, printable
from lpt_peft.cli.common.exit_codes import FAILED, INCOMPLETE, OK
from lpt_peft.cli.common.extras import requires_extra
from lpt_peft.cli.common.messages import notice, print_message, without_errno
from lpt_peft.cli.common.options import Json
from lpt_peft.errors import ConfigError, InputError, LPTError

if TYPE_CHECKING:
    from lpt_peft.inference import Prediction

_SHOW = 3
_BLOCK = 2**16


def predict(
    model: tyro.conf.Positional[str],
    images: tyro.conf.Positional[tuple[str, ...]],
    /,
    *,
    show: int | None = None,
    min_probability: float = 0.0,
    output_format: Annotated[Literal["table", "json", "jsonl", "csv"] | None, tyro.conf.arg(name="format")] = None,
    as_json: Json = False,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str | None = None,
) -> int:
    """Print the most probable classes of images; images that cannot be read are left out and named at the end.

    Args:
        model: Output folder of `lpt-peft train`, a prompt file or model file, or OWNER/NAME on the Hugging Face Hub.
        images: Image files, folders and patterns; - reads paths from standard input, one per line or separated by NUL.
        show: Classes to print for each image, the most probable first; None: 3, or all of fewer.
        min_probability: Reject images whose most probable class has a lower probability; they are marked and counted.
        output_format: table; json, a list; jsonl, an object per line; or csv. All appear batch by batch. None: table.
        as_json: The same as --format json.
        batch_size: Images of a forward pass.
        num_workers: Processes that read images; None: a process per core, at most 8, and none for few images.
        device: Where the model computes, such as cpu or cuda:1; None: the accelerator if there is any.
    """
    with requires_extra("lpt-peft predict", "cli"):
        from lpt_peft.cli.common.image_progress import image_progress
        from lpt_peft.cli.common.prediction_output import make_writer
        from lpt_peft.inference import Classifier
        from lpt_peft.recipe.resume.interrupt import Interruption

    _check_options(images, show, min_probability, batch_size, num_workers)
    if as_json and output_format not in (None, "json"):
        raise ConfigError(f"--json is --format json, which contradicts --format {output_format}: give one of them.")
    classifier = Classifier.from_pretrained(model, batch_size=batch_size, num_workers=num_workers, device=device)
    if min_probability and classifier.temperature is None:
        notice("the probabilities are not calibrated: the run had no validation split to fit a temperature on")
    if show is not None and show > classifier.num_classes:
        raise ConfigError(f"--show {show} must be from 1 to {classifier.num_classes}, the number of classes.")
    paths, total = _given_paths(images)
    show = min(show or _SHOW, classifier.num_classes)
    writer = make_writer(output_format or ("json" if as_json else "table"), show, min_probability > 0)
    tally = _Tally(min_probability)
    try:
        with closing(classifier.stream(paths, show=show)) as predictions, image_progress(total) as advance:
            for batch in _batches(predictions, batch_size):
                with Interruption() as stop:  # a line is never cut
                    writer.write([tally.add(prediction) for prediction in batch])
                if stop.requested:
                    raise KeyboardInterrupt
                advance(len(batch))
    except (KeyboardInterrupt, LPTError) as error:
        if tally.seen:
            writer.close()
        tally.report()
        if isinstance(error, LPTError):
            raise
        raise KeyboardInterrupt(f"interrupted after {number(tally.seen, 'image')}") from None
    if not tally.seen:
        raise InputError("Standard input names no image: give a path per line, or separate them by NUL.")
    writer.close()
    return tally.report()


def _check_options(
    images: Sequence[str], show: int | None, min_probability: float, batch_size: int, num_workers: int | None
) -> None:
    if not images:
        raise InputError(
            "predict needs images: lpt-peft predict MODEL IMAGE ..., a folder, or - to read paths from stdin."
        )
    if show is not None and show < 1:
        raise ConfigError(f"--show {show} must be at least 1.")
    if not 0 <= min_probability <= 1:
        raise ConfigError(f"--min-probability {min_probability:g} must be a probability, from 0 to 1.")
    for name, value, low in (("--batch-size", batch_size, 1), ("--num-workers", num_workers, 0)):
        if value is not None and value < low:
            raise ConfigError(f"{name} {value} must be at least {low}.")


def _batches(predictions: Iterable[Prediction], size: int) -> Iterator[list[Prediction]]:
    """Yield lists of predictions, and those before an error before it is raised."""
    batch: list[Prediction] = []
    try:
        for prediction in predictions:
            batch.append(prediction)
            if len(batch) == size:
                yield batch
                batch = []
    except LPTError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


class _Tally:
    """Counts rejected images and collects those that cannot be read.

    Args:
        min_probability: Least probability of an image that is not rejected; 0 rejects no image.
    """

    def __init__(self, min_probability: float) -> None:
        self._least = min_probability
        self.seen = self._rejected = 0
        self._failed: list[tuple[str, str]] = []

    def add(self, prediction: Prediction) -> dict[str, Any]:
        """Count a prediction and return it as plain JSON, with "rejected" if there is a least probability."""
        self.seen += 1
        answer = prediction.to_dict()
        if prediction.error is not None:
            answer["error"] = without_errno(prediction.error)
            self._failed.append((prediction.image, answer["error"]))
        elif self._least:
            answer["rejected"] = prediction.probability < self._least
            self._rejected += answer["rejected"]
        return answer

    def report(self) -> int:
        """Print the counts and the unreadable images on standard error; return the exit status."""
        seen, failed = self.seen, self._failed
        if self._rejected:
            notice(
                f"{self._rejected} of {number(seen, 'image')} rejected: no class has a probability of {self._least:g}"
            )
        if not failed:
            return OK
        print_message(f"{len(failed)} of {seen} images cannot be read and were left out:")
        for image, error in failed:
            print(printable(f"  {image}: {error}", 10_000), file=sys.stderr)
        return FAILED if len(failed) == seen else INCOMPLETE


def _given_paths(places: Sequence[str]) -> tuple[Iterable[str], int | None]:
    """The image files of the command line and their number; None while standard input is read."""
    from lpt_peft.data.files.path_list import PathList
    from lpt_peft.inference import image_paths

    if "-" in places:
        found = (_paths_of_stdin() if place == "-" else image_paths(place) for place in places)
        return chain.from_iterable(found), None
    paths = PathList()
    for path in image_paths(places):
        paths.append(path)
    return paths, len(paths)


def _paths_of_stdin() -> Iterator[str]:
    """The paths on standard input as they come, separated by NUL if its first block has any, else on a line each."""
    stream: Any = sys.stdin.buffer
    content = stream.read1(_BLOCK)
    separator = b"\0" if b"\0" in content else b"\n"
    rest = b""
    while content:
        *names, rest = (rest + content).split(separator)
        yield from _decoded(names)
        content = stream.read1(_BLOCK)
    yield from _decoded([rest])


def _decoded(names: Sequence[bytes]) -> Iterator[str]:
    for name in names:
        if path := name.removesuffix(b"\r"):  # of lists written on Windows
            yield os.fsdecode(path)
