"""Runs the cells of a comparison side by side, each in a new process.

A separate process per cell keeps a crash, a full memory or the first Accelerator's precision away from other cells.
The processes belong to no terminal: this process receives Ctrl-C and makes each of them save and stop.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process

from tqdm.auto import tqdm

from lpt_peft._files import make_folder
from lpt_peft._text import number
from lpt_peft.errors import LPTError
from lpt_peft.recipe.compare.cells import LOG, Cell
from lpt_peft.recipe.progress import Reporter, has_bar
from lpt_peft.recipe.resume.folders import write_errors
from lpt_peft.recipe.resume.interrupt import Interruption

_POLL = 0.2  # seconds between looks at a requested stop
_PATIENCE = 600.0  # seconds for a step and its checkpoint after Ctrl-C
_LONGEST_ERROR = 10_000  # characters: the pipe, which is read after the process has ended, must hold them

Work = Callable[[Cell], None]
"""Trains and evaluates a cell; pickled, so a function of a module, or a `functools.partial` of it."""


@dataclass
class Outcome:
    """What became of the cells that were run."""

    finished: list[Cell] = field(default_factory=list)
    failed: dict[Cell, str] = field(default_factory=dict)
    """Error of each failed cell."""


@dataclass
class _Running:
    cell: Cell
    process: BaseProcess
    errors: Connection
    slot: int
    start: float


def run_cells(cells: Sequence[Cell], work: Work, *, jobs: int = 1, total: int | None = None) -> Outcome:
    """Run `work` for every cell, at most `jobs` at a time; a failed cell does not stop the others.

    Each process appends its output to `log.txt` in the folder of its cell. With several GPUs, the processes use them in
    turn. Unless the environment sets them, CPU threads are divided among the processes.

    Args:
        cells: In the order in which they start.
        work: Called in a new process.
        jobs: Processes at a time, at least 1.
        total: Cells of the comparison, for messages; None: `len(cells)`.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM; every process has saved and stopped. A second signal kills them.
        StateError: A folder is not writable.
    """
    outcome, waiting = Outcome(), list(cells)
    running: list[_Running] = []
    total = total or len(cells)
    reporter = Reporter(True, True)
    slots = list(range(jobs))
    began, gpus = time.monotonic(), _gpus()
    bar = tqdm(total=total, initial=total - len(cells), unit="cell", disable=not has_bar())
    with Interruption() as interruption, bar:
        try:
            while (waiting and not interruption.requested) or running:
                while waiting and slots and not interruption.requested:
                    cell, slot = waiting.pop(0), slots.pop(0)
                    running.append(_start(cell, work, slot, _environment(slot, jobs, gpus)))
                    reporter.note(f"{cell}: started; its output is in {cell.folder / LOG}")
                wait([item.process.sentinel for item in running], _POLL)
                if interruption.requested:
                    _stop(running, reporter)
                for item in [item for item in running if not item.process.is_alive()]:
                    running.remove(item)
                    slots.append(item.slot)
                    error = _error(item)
                    if error is None:
                        outcome.finished.append(item.cell)
                    elif not interruption.requested:
                        outcome.failed[item.cell] = error
                    seconds = timedelta(seconds=round(time.monotonic() - item.start))
                    done = len(outcome.finished) + len(outcome.failed)
                    left = timedelta(seconds=round((time.monotonic() - began) / max(done, 1) * (len(cells) - done)))
                    if not interruption.requested:
                        place = f"{total - len(cells) + done} of {total}"
                        reporter.note(f"{item.cell}: {error or 'finished'} ({seconds}; {place}, {left} left)")
                        bar.update()
        finally:
            for item in running:
                item.process.kill()
                item.process.join()
    if interruption.requested:
        raise KeyboardInterrupt(f"interrupted; {number(total - len(waiting), 'cell')} of {total} were started")
    return outcome


def _start(cell: Cell, work: Work, slot: int, environment: Mapping[str, str]) -> _Running:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with write_errors(cell.folder):
        make_folder(cell.folder)
    process = context.Process(target=_child, args=(cell, work, sender), name=str(cell))
    with _changed_environment(environment), _without_interrupts():
        process.start()
    sender.close()
    return _Running(cell, process, receiver, slot, time.monotonic())


def _stop(running: Sequence[_Running], reporter: Reporter) -> None:
    """Ask every process to finish its step, save and stop, and wait for all of them."""
    reporter.note(f"Stopping {number(len(running), 'cell')} after the current step; Ctrl-C again stops at once")
    for item in running:
        item.process.terminate()  # SIGTERM, which a run defers until its step is done
    end = time.monotonic() + _PATIENCE
    for item in running:
        item.process.join(max(0.0, end - time.monotonic()))


def _error(item: _Running) -> str | None:
    """The error of an ended process, None after success."""
    item.process.join()
    code, message = item.process.exitcode, ""
    with suppress(EOFError, OSError):
        if item.errors.poll():
            message = str(item.errors.recv())
    item.errors.close()
    if code == 0:
        return None
    if message:
        return message
    reason = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
    return f"its process ended with {reason} (killed, or out of memory); see {item.cell.folder / LOG}"


def _child(cell: Cell, work: Work, errors: Connection) -> None:
    """Entry of the process of a cell."""
    if hasattr(os, "setsid"):
        os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with (cell.folder / LOG).open("ab", buffering=0) as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    try:
        work(cell)
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{stop or 'interrupted'}\n")
        sys.exit(130)
    except Exception as error:
        traceback.print_exc()
        message = str(error) if isinstance(error, LPTError) else f"{type(error).__name__}: {error}"
        errors.send(message[:_LONGEST_ERROR])
        sys.exit(1)


def _end_with_parent() -> None:
    """End this process when the comparison was killed; the last checkpoint is intact."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them; empty without CUDA."""
    import torch  # noqa: PLC0415 - torch need not be imported to plan

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (visible or [str(index) for index in range(count)])[:count]


def _environment(slot: int, jobs: int, gpus: Sequence[str]) -> dict[str, str]:
    """Environment of a process: its GPU, and its share of the CPU's threads and of the loading workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"LOCAL_WORLD_SIZE": str(jobs)}  # by which a run divides its loading workers
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


@contextmanager
def _changed_environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start a process that never receives Ctrl-C, also before it leaves the terminal; this process gets it later."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
