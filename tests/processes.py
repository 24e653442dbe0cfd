"""Functions called in new processes: in a single process, or as the ranks of a gloo process group.

Every process starts as `python -m tests.processes`, never as a fork, so it inherits no threads and no state. The
function and its arguments are pickled; the function must therefore be at the top level of a module.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
TIMEOUT = 240.0  # seconds


class Child:
    """A new process that calls `function(*args)`; its output goes to a file, and it leads a process group.

    A context manager: the process and all that it started are killed at the end of the block.
    """

    def __init__(self, function: Callable[..., Any], *args: Any, env: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lpt_peft-child-")
        folder = Path(self._folder.name)
        self._output, self._result = folder / "output", folder / "result"
        (folder / "call").write_bytes(pickle.dumps((function, args)))
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.processes", str(folder)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """0 after a return, 1 after an exception, minus the signal's number after a signal; None while it runs."""
        return self._process.poll()

    @property
    def output(self) -> str:
        """Everything written to stdout and stderr so far."""
        return self._output.read_text(errors="replace")

    def wait(self, timeout: float = TIMEOUT) -> int:
        """The exit code; AssertionError with the output after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not finished after {timeout:g} s:\n{self.output}") from None

    def result(self, timeout: float = TIMEOUT) -> Any:
        """What the function returned; AssertionError with the output unless it returned in time."""
        code = self.wait(timeout)
        assert code == 0, f"exit code {code}:\n{self.output}"
        return pickle.loads(self._result.read_bytes())

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process group, and after SIGKILL wait for the end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    world_size: int = 2,
    init: bool = True,
    timeout: float = TIMEOUT,
) -> list[Any]:
    """Call `function(*args)` on each rank of a gloo process group; the returned values, by rank.

    Environment variables are those of torchrun, on a port that is already bound. With `init` the process group
    exists before the call and is destroyed after it; without, the function may leave that to Accelerate or
    Lightning. When a rank fails or the time is over, all ranks are killed and their output is in the AssertionError.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 connects to this store too, in place of starting its own
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if Path("/sys/class/net/lo").exists():  # the host's name may have no address
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    end = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(Child(_as_rank, init, function, args, env={**shared, "RANK": rank, "LOCAL_RANK": rank}))
            for rank in map(str, range(world_size))
        ]
        while any(rank.exit_code is None for rank in ranks):
            failed = any(rank.exit_code for rank in ranks)
            if failed or time.monotonic() > end:
                for rank in ranks:
                    rank.kill()
                reason = "a rank failed" if failed else f"not finished after {timeout:g} s"
                raise AssertionError(f"{reason}\n{_report(ranks)}")
            with contextlib.suppress(AssertionError):  # wait for any change, 50 ms at most
                next(rank for rank in ranks if rank.exit_code is None).wait(0.05)
        assert not any(rank.exit_code for rank in ranks), f"a rank failed\n{_report(ranks)}"
        return [rank.result() for rank in ranks]


def wait_until(condition: Callable[[], object], timeout: float = TIMEOUT) -> None:
    """Return as soon as `condition()` is true; AssertionError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not true after {timeout:g} s: {condition}"
        time.sleep(0.01)


def _report(ranks: list[Child]) -> str:
    return "\n".join(f"rank {i}, exit code {rank.exit_code}:\n{rank.output}" for i, rank in enumerate(ranks))


def _as_rank(init: bool, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    if not init:
        return function(*args)
    dist.init_process_group("gloo")
    try:
        result = function(*args)
        dist.barrier()  # a rank that leaves early breaks the collectives of the others
        return result
    finally:
        dist.destroy_process_group()


def _main(folder: Path) -> None:
    function, args = pickle.loads((folder / "call").read_bytes())
    result = function(*args)
    (folder / "result").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
