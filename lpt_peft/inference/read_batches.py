"""Batches of images of any kind, read in worker processes in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader

from lpt_peft.data.workers import open_batches, worker_options
from lpt_peft.errors import StateError
from lpt_peft.inference.items import ItemPreparer, ItemReader, Prepared, collate_read


class ReadBatch(NamedTuple):
    """A batch of images."""

    names: list[str]
    errors: list[str | None]
    """Of each image, the reason why it cannot be read, or None."""
    pixels: Tensor | None
    """(B, 3, h, w) float32, of the images without an error; None if there are none."""


def read_batches(
    images: Iterable[Any],
    prepare: ItemPreparer,
    transform: Callable[[Any], Tensor],
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
) -> Generator[ReadBatch, None, None]:
    """Yield the images in batches, in order; close the generator to stop the workers before its end.

    Args:
        images: Single images, any number.
        prepare: Checks and names each image, in this process.
        transform: From a PIL image to a tensor (3, h, w), in the workers.
        batch_size: Images of a batch.
        num_workers: Processes that read images; 0 reads in this process.
        pin_memory: Read into pinned memory, for asynchronous copies to an accelerator.

    Raises:
        InputError: An image has another type or shape. This error, and those of the iterable, are raised after the
            batches of the images before it.
        StateError: A worker process was killed.
    """
    names: deque[list[str]] = deque()
    failures: list[Exception] = []
    loader = DataLoader(
        ItemReader(transform),
        batch_sampler=_batches(_prepared(images, prepare, failures), batch_size, names),  # images in place of indices
        collate_fn=collate_read,
        pin_memory=pin_memory,
        **worker_options(num_workers),
    )
    with open_batches(loader) as batches:
        while (batch := _next(batches)) is not None:
            pixels, errors = batch
            yield ReadBatch(names.popleft(), errors, pixels)
    if failures:
        raise failures[0]


def _prepared(
    images: Iterable[Any], prepare: ItemPreparer, failures: list[Exception]
) -> Iterator[tuple[str, Prepared]]:
    """Yield names and prepared images; an error ends them and is appended to `failures`."""
    try:
        for position, image in enumerate(images):
            yield prepare(image, position)
    except Exception as error:
        failures.append(error)


def _batches(prepared: Iterator[tuple[str, Prepared]], batch_size: int, names: deque[list[str]]) -> Iterator[list[Any]]:
    """Yield batches of prepared images, and append their names."""
    while batch := list(islice(prepared, batch_size)):
        names.append([name for name, _ in batch])
        yield [image for _, image in batch]


def _next(batches: Iterator[Any]) -> Any:
    """The next batch, None at the end; with an error that names the cure if a worker process was killed."""
    try:
        return next(batches, None)
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise StateError(
            f"A process that reads images was killed, by a lack of memory or by a damaged image: {error!s:.200}. Use "
            "fewer workers or a smaller batch; num_workers=0 reads in this process."
        ) from error
