"""`lpt-peft compare DATA --rows ROWS --seeds N --output DIR`: train several rows of settings, and compare them.

Not here: the format of the rows (`common/rows.py`), processes and figures (`lpt_peft.recipe.compare`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lpt_peft.cli.common.exit_codes import FAILED, INCOMPLETE, OK
from lpt_peft.cli.common.extras import requires_extra
from lpt_peft.cli.common.flags import check_phase_flags
from lpt_peft.cli.common.messages import notice
from lpt_peft.cli.common.options import Json
from lpt_peft.cli.common.paths import check_new_folder
from lpt_peft.cli.common.rows import BUILT_IN, Rows, default_settings, overridden_flags, read_rows, sizes_without_effect
from lpt_peft.cli.common.run_settings import RunSettings
from lpt_peft.errors import ConfigError

if TYPE_CHECKING:
    from lpt_peft.recipe.compare.cells import Cell

Split = Literal["test", "validation"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a comparison runs."""

    data: str
    output: Path
    settings: Mapping[str, RunSettings]
    """Settings of each row, with the first seed."""
    seeds: Sequence[int]
    split: Split
    baseline: str | None

    def run(self, cell: Cell) -> RunSettings:
        """Return the settings of a cell."""
        row = self.settings[cell.row]
        return replace(row, training=replace(row.training, seed=cell.seed))


def compare_command(words: Sequence[str]) -> Callable[..., int]:
    """Return the sub-command, with the [defaults] of the --rows among `words`.

    Raises:
        ConfigError: The rows cannot be used, or a flag of a phase is out of range.
    """
    rows, start = None, RunSettings(backbone="")
    if words[:1] == ["compare"]:
        check_phase_flags(words)
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--rows")
        if given := parser.parse_known_args(list(words))[0].rows:
            rows = read_rows(given)
            start = default_settings(rows)

    def compare(
        data: tyro.conf.Positional[str],
        /,
        *,
        rows: Annotated[
            str, tyro.conf.arg(help=f"A .toml file, or built-in rows, separated by commas: {', '.join(BUILT_IN)}.")
        ],
        output: Path,
        seeds: int = 3,
        split: Split = "test",
        jobs: int = 1,
        baseline: str | None = None,
        run: Annotated[RunSettings, tyro.conf.arg(name="")] = start,
        as_json: Json = False,
    ) -> int:
        """Train rows of settings with several seeds and compare them; the same command resumes.

        Every row and seed is an ordinary run in DIR/ROW/seedN. See docs/how-to/compare.md for the file of rows. The
        exit status is 1 if a run failed; the others are still compared.

        Args:
            data: The images, as for `lpt-peft train`.
            rows: Rows to compare.
            output: Folder for results.json, table.md, compare.png and the runs.
            seeds: Number of seeds, beginning with --seed.
            split: Split that is measured; choose settings on validation, and use test for final results only.
            jobs: Runs at a time, each in its own process; several GPUs are used in turn.
            baseline: Row for paired differences; by default that of the file.
            run: Settings of every row, which override [defaults]; a row overrides both.
            as_json: Print the content of results.json instead of the table.
        """
        read = read_rows(rows)
        for row, flag in overridden_flags(read, words):
            notice(f"row {row} sets {flag} itself, so the flag does not change it")
        plan = make_plan(read, run, data, output, seeds=seeds, split=split, baseline=baseline)
        for row, name in sizes_without_effect(read, plan.settings):
            notice(f"row {row}: {name}: no effect with method {plan.settings[row].training.method}")
        if jobs < 1:
            raise ConfigError(f"--jobs {jobs} must be at least 1.")
        return run_plan(plan, jobs=jobs, as_json=as_json)

    return compare


def make_plan(
    rows: Rows, run: RunSettings, data: str, output: Path, *, seeds: int, split: Split, baseline: str | None
) -> Plan:
    """Validate all rows and seeds.

    Raises:
        ConfigError: A setting is out of range, or a row does not exist; the message names the row.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds} must be at least 1.")
    if baseline is not None and baseline not in rows.rows:
        raise ConfigError(f"--baseline {baseline} must be a row: {', '.join(rows.rows)}.")
    first = run.training.seed
    return Plan(
        data=data,
        output=output,
        settings=rows.settings(run),
        seeds=range(first, first + seeds),
        split=split,
        baseline=baseline or rows.baseline,
    )


def run_plan(plan: Plan, *, jobs: int, as_json: bool) -> int:
    """Run the cells that are not finished, then write and print the results; return the exit status.

    Raises:
        LPTError: The data, a row or an earlier run in the output folder is not usable.
        KeyboardInterrupt: Ctrl-C was pressed; the runs were saved.
    """
    with requires_extra("lpt-peft compare", "train"):
        from lpt_peft.cli.common.compare_cells import Comparer
        from lpt_peft.cli.common.open_data import check_output
        from lpt_peft.cli.common.streams import print_json, print_text
        from lpt_peft.cli.common.tables import print_table
        from lpt_peft.recipe.compare.lock import locked
        from lpt_peft.recipe.compare.schedule import run_cells
        from lpt_peft.recipe.compare.table import caption, table

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("lpt-peft compare starts its own processes: start it once, with --jobs, without a launcher.")
    check_new_folder(plan.output)
    for name, settings in plan.settings.items():
        check_output(plan.output / name, plan.data, settings.images)
    with locked(plan.output):
        comparer = Comparer(plan)
        waiting = [cell for cell in comparer.cells if not comparer.is_finished(cell)]
        if done := len(comparer.cells) - len(waiting):
            notice(f"{done} of {len(comparer.cells)} runs are finished")
        outcome = run_cells(waiting, partial(run_cell, plan), jobs=jobs, total=len(comparer.cells))
        comparison = comparer.write_results(outcome.failed)
    if as_json:
        print_json(comparison.to_dict())
    elif comparison.rows:
        header, cells = table(comparison)
        print_table(cells, header)
        print_text(caption(comparison))
        print_text(f"Written to {plan.output}/: results.json, table.md, compare.png, and a folder for each run")
    for cell, error in outcome.failed.items():
        notice(f"{cell} failed: {error}")
    if outcome.failed:
        return FAILED
    return INCOMPLETE if comparer.left_out else OK


def run_cell(plan: Plan, cell: Cell) -> None:
    """Train and evaluate a cell, in a new process, as `lpt-peft train` does.

    Raises:
        LPTError: As `lpt-peft train`.
        KeyboardInterrupt: The process received SIGTERM; the run was saved.
    """
    from lpt_peft.cli.common.streams import replace_unprintable
    from lpt_peft.cli.train import run_training
    from lpt_peft.recipe.compare.cells import measuring

    replace_unprintable(sys.stdout, sys.stderr)
    splits = ["validation", "test"] if plan.split == "test" else ["validation"]
    with measuring(cell.folder, splits) as record:
        status = run_training(
            plan.data,
            cell.folder,
            plan.run(cell),
            resume=True,
            log_with=None,
            as_json=False,
            with_test=plan.split == "test",
        )
        record["incomplete"] = status == INCOMPLETE
