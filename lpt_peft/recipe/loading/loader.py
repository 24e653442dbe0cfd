"""DataLoaders of the recipe: how many worker processes, how they start, and how they treat signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lpt_peft.recipe.checks import collate
from lpt_peft.recipe.randomness import kept_random_state

_MOST = 8
_SMALL = 256  # images; below it, starting workers takes about as long as loading
_BATCHES = 3  # of a worker in shared memory: two ready, one in the making
_SHARED_MEMORY = Path("/dev/shm")


def resolve_workers(num_workers: int | None, dataset: Dataset[Any], batch_size: int) -> int:
    """Worker processes of a loader in this process.

    Args:
        num_workers: Taken as it is; None takes one for each core that this process may use, shared among the training
            processes of this machine, at most 8 and no more than shared memory has room for. Then it is 0 for fewer
            than 256 images, and where processes cannot be forked (macOS, Windows): workers that are spawned need a
            main guard in the script and a dataset that can be pickled, which only the caller can know.
        dataset: Map-style, yields (image, label).
        batch_size: Images of a batch.

    Raises:
        InputError: The first item is no image of known size.
    """
    if num_workers is not None:
        return num_workers
    size = len(dataset)  # type: ignore[arg-type]
    if size < _SMALL or not hasattr(os, "sched_getaffinity") or not _SHARED_MEMORY.is_dir():
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun and accelerate launch
    with kept_random_state():
        image, _ = collate([dataset[0]])
    space = os.statvfs(_SHARED_MEMORY)
    room = space.f_bavail * space.f_frsize // (_BATCHES * batch_size * image.nbytes)
    return min(_MOST, len(os.sched_getaffinity(0)) // processes, room // processes)


def image_loader(
    dataset: Dataset[Any], *, num_workers: int, pin_memory: bool = False, persistent: bool = False, **sampling: Any
) -> DataLoader[Any]:
    """A loader of (images, labels) batches, see `collate`.

    Workers are forked where that is safe (Linux), unless the caller has set another start method: a fork costs
    milliseconds instead of seconds of imports, and takes datasets that cannot be pickled and scripts without a main
    guard. Workers only read, decode and crop images on one thread; they never touch an accelerator or autograd, whose
    threads and locks do not survive a fork.

    Args:
        dataset: Map-style.
        num_workers: Worker processes; 0 loads in this process.
        pin_memory: For copies to an accelerator that the host does not wait for.
        persistent: Workers live as long as the loader, not as one pass over it.
        **sampling: What the loader draws: `batch_size` and `sampler`, or `batch_sampler`.
    """
    fork = hasattr(os, "sched_getaffinity") and multiprocessing.get_start_method(allow_none=True) in (None, "fork")
    return DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=persistent and num_workers > 0,
        multiprocessing_context="fork" if fork and num_workers else None,
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator(),  # of its own: the loader would draw a seed from the caller's
        **sampling,
    )


def _leave_signals_to_parent(worker: int) -> None:
    """Survive a Ctrl-C or SIGTERM sent to the whole process group, so that the parent can finish its step and save.

    The parent ends its workers by a message, and by SIGTERM if that does not help: so a second one counts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)


def _ignore_once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
