"""Worker processes of DataLoaders: their number, start method, signals and shutdown.

Not here: what the workers read (`lpt_peft.recipe.loading`, `lpt_peft.inference`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

_MAX_WORKERS = 8
_SMALL = 256  # images; below this, starting workers takes about as long as loading
_BATCHES = 3  # per worker in shared memory: two prefetched, one in progress
_SHARED_MEMORY = Path("/dev/shm")


def choose_workers(num_images: int | None, batch_bytes: Callable[[], int]) -> int:
    """Choose a number of worker processes for a loader in this process.

    The number of cores available to this process, divided by the number of training processes on this machine, at most
    8 and at most what fits into shared memory. It is 0 for fewer than 256 images, and where processes cannot be forked
    (macOS, Windows): spawned workers need a main guard in the script and a dataset that can be pickled, which only the
    caller can ensure.

    Args:
        num_images: Images to load; None if unknown, which counts as many.
        batch_bytes: Returns the size of a batch; called only if workers are possible.
    """
    small = num_images is not None and num_images < _SMALL
    if small or not hasattr(os, "sched_getaffinity") or not _SHARED_MEMORY.is_dir():
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun and accelerate launch
    space = os.statvfs(_SHARED_MEMORY)
    room = space.f_bavail * space.f_frsize // (_BATCHES * batch_bytes())
    return min(_MAX_WORKERS, len(os.sched_getaffinity(0)) // processes, room // processes)


def worker_options(num_workers: int) -> dict[str, Any]:
    """Keyword arguments of a `DataLoader` that starts workers safely and leaves signals and random state alone.

    Workers are forked where that is safe (Linux), unless the caller has set another start method: a fork takes
    milliseconds instead of seconds of imports, and works with datasets that cannot be pickled and scripts without a
    main guard. Workers only read, decode and crop images on a single thread. They never use an accelerator or
    autograd, whose threads and locks do not survive a fork.

    Args:
        num_workers: Worker processes; 0 loads in this process.
    """
    fork = hasattr(os, "sched_getaffinity") and multiprocessing.get_start_method(allow_none=True) in (None, "fork")
    return {
        "num_workers": num_workers,
        "multiprocessing_context": "fork" if fork and num_workers else None,
        "worker_init_fn": _start_worker,
        "generator": torch.Generator(),  # by default the loader draws a seed from the caller's generator
    }


@contextmanager
def open_batches(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """Iterate over a loader inside the context; its workers end with the context unless they are persistent.

    After an exception the traceback keeps a loader's iterator alive until the garbage collector finds both. It may then
    close the queues before the iterator uses them to stop its workers, which hang until they are killed, ten seconds
    later ("Bad file descriptor" in QueueFeederThread). Here they are stopped at once.
    """
    try:
        iterator = iter(loader)
    except BaseException as error:
        _kill_workers(error)
        raise
    try:
        yield iterator
    except BaseException:
        stop_workers(loader, iterator)
        raise
    if not loader.persistent_workers:
        stop_workers(loader, iterator)


def stop_workers(loader: DataLoader[Any], iterator: Iterator[Any] | None = None) -> None:
    """Stop the worker processes of a loader and of an iterator over it; a later pass starts new workers."""
    for running in {id(item): item for item in (iterator, loader._iterator) if item is not None}.values():
        if shutdown := getattr(running, "_shutdown_workers", None):  # absent without workers
            shutdown()
    loader._iterator = None


def _kill_workers(error: BaseException) -> None:
    """Kill the workers of an iterator whose constructor failed, by an interruption or an error of the sampler.

    Only the traceback refers to the iterator. Its workers would ignore the SIGTERM that Python sends at exit, and keep
    it waiting.
    """
    for frame, _ in walk_tb(error.__traceback__):
        if isinstance(iterator := frame.f_locals.get("self"), _BaseDataLoaderIter):
            for worker in getattr(iterator, "_workers", ()):
                worker.kill()
                worker.join()


def _start_worker(worker: int) -> None:
    """Ignore SIGINT and the first SIGTERM, so that the parent can finish its step and save.

    A terminal or a cluster sends them to the whole process group. The parent stops its workers by a message, and by
    SIGTERM if that fails; therefore the second SIGTERM takes effect.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)
    sys.excepthook = _report_thread


def _ignore_once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def _report_thread(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Report an error of the thread that sends tensors, unless the parent was interrupted while it received them."""
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)
