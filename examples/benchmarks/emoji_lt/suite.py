"""Emoji-LT on one GPU: tune on validation emoji, then train the rows with several seeds, in parts that resume.

    python suite.py emoji_lt --output results.jsonl --minutes 7.5     # again until its exit status is 0

A run is a row of a TOML file with a seed. Several processes share the GPU and keep the images in memory. The runs that
decide come first, and `results.jsonl` gets a line as soon as a run has finished: the next call skips it.

1. `tune.toml`, on validation images only, seed 100. The text before the first dot of a row is its family; the row with
   the best balanced accuracy passes its rates on to the rows below of the same family (`family_of`).
2. `rows.toml`, with seeds 0 to `--seeds - 1`, seed by seed.
3. `ablations.toml`, with seed 0.

Each file also works alone with `lpt-peft compare`. `rows.toml` and `ablations.toml` beside the results have the
settings after step 1, and `python table.py results.jsonl` prints the tables. Paths in the files, such as
`vit.safetensors`, are relative to the working directory. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from _cell import EVALUATED, prepare_process, run_cell
from _plan import ABLATIONS, ROWS, TUNE, Cell, cells, to_toml, tuned

from lpt_peft.cli.common.rows import read_rows
from lpt_peft.cli.common.run_settings import RunSettings

HERE = Path(__file__).parent
TUNING_SEED = 100


class Results:
    """The file of results: a JSON object per line and run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def of(self, cell: Cell) -> dict[str, Any] | None:
        """Return the line of a finished run with the same settings; a run that failed is tried again."""
        expected = {"stage": cell.stage, "row": cell.row, "seed": cell.seed}
        for line in self.lines:
            same = all(line[key] == value for key, value in expected.items())
            if (
                same
                and ("error" not in line or line["diverged"])
                and RunSettings.from_dict(line["settings"]) == cell.run
            ):
                return line
        return None

    def add(self, cell: Cell, found: Mapping[str, Any]) -> None:
        """Append a line."""
        self.lines.append({**cell.to_dict(), **found})
        with self.path.open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")


class Runner:
    """Runs cells side by side until the deadline."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.results = options, Results(options.output)
        self.start = time.perf_counter()
        self.pace: dict[str, float] = {}  # seconds per epoch of the slowest run of a stage
        self.late = False  # whether a run was not started because of the deadline
        self.failed = self.finished = 0
        self.pool = None
        if options.jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(options.jobs, spawn, initializer=prepare_process)

    def run(self, cells: Sequence[Cell]) -> bool:
        """Run the cells that have no result; return False if the deadline stops them.

        Raises:
            SystemExit: The first runs of this part all failed.
        """
        pending = iter([cell for cell in cells if self.results.of(cell) is None])
        running: dict[Future[dict[str, Any]], Cell] = {}
        while True:
            while len(running) < self.options.jobs and (cell := self._next(pending)) is not None:
                running[self._submit(cell)] = cell
            if not running:
                return not self.late
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                self._record(running.pop(future), future.result())

    def close(self) -> None:
        """Stop the processes."""
        if self.pool is not None:
            self.pool.shutdown()

    def _next(self, pending: Iterator[Cell]) -> Cell | None:
        """Return the next cell, if it would end before the deadline at the pace of the slowest run."""
        left = 60 * self.options.minutes - (time.perf_counter() - self.start)
        cell = next(pending, None)
        if cell is None:
            return None
        pace = self.pace.get(cell.stage) or max(self.pace.values(), default=0.0)
        if left < pace * cell.epochs:
            self.late = True
            return None
        return cell

    def _submit(self, cell: Cell) -> Future[dict[str, Any]]:
        if self.pool is not None:
            return self.pool.submit(run_cell, cell, self.options.data)
        future: Future[dict[str, Any]] = Future()
        future.set_result(run_cell(cell, self.options.data))
        return future

    def _record(self, cell: Cell, found: dict[str, Any]) -> None:
        self.results.add(cell, found)
        seconds = found.get("seconds", 0.0)
        self.pace[cell.stage] = max(self.pace.get(cell.stage, 0.0), seconds / cell.epochs)
        accuracies = "  ".join(
            f"{name} {100 * found[name]['overall']:.1f} (few {100 * (found[name]['few'] or 0):.0f})"
            for name in EVALUATED
            if name in found
        )
        elapsed = time.perf_counter() - self.start
        text = found.get("error") or f"{accuracies}  {seconds:.0f} s"
        print(f"[{elapsed:4.0f} s] {cell.stage} {cell.row} seed {cell.seed}: {text}", flush=True)
        self.failed += "error" in found and not found["diverged"]
        self.finished += "error" not in found
        if self.failed > self.options.jobs and not self.finished:
            sys.exit("The first runs all failed: see the errors above.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a part; return 0 if all runs have finished, otherwise 3."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of build.py")
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"))
    for name in (TUNE, ROWS, ABLATIONS):
        parser.add_argument(f"--{name}", type=Path, default=HERE / f"{name}.toml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=7.5, help="no run starts that would end later")
    parser.add_argument("--jobs", type=int, default=6, help="processes on the GPU; 1: this process")
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    tune, rows, ablations = (read_rows(str(path)) for path in (options.tune, options.rows, options.ablations))
    tuning = cells(TUNE, tune, [TUNING_SEED])
    cells(ROWS, rows, [0]), cells(ABLATIONS, ablations, [0])  # raises an error before the first run
    runner = Runner(options)
    try:
        plan = tuning
        if runner.run(tuning):
            lines = [line for cell in tuning if (line := runner.results.of(cell)) is not None]
            scores = {line["row"]: line["validation"]["overall"] for line in lines if "validation" in line}
            rows, ablations = tuned(rows, tune, scores), tuned(ablations, tune, scores)
            for name, chosen in ((ROWS, rows), (ABLATIONS, ablations)):
                (options.output.parent / f"{name}.toml").write_text(to_toml(chosen))
            later = cells(ROWS, rows, range(options.seeds)) + cells(ABLATIONS, ablations, [0])
            runner.run(later)
            plan = [*tuning, *later]
    finally:
        runner.close()
    left = runner.late or any(runner.results.of(cell) is None for cell in plan)
    print("Runs are left, or failed: run the same command again." if left else "Complete.")
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
