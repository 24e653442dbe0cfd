"""The cells of a comparison in its output folder: which are finished, and their results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lpt_peft._files import write_atomic
from lpt_peft._json import flatten
from lpt_peft._run_folder import MODEL, MODEL_METHODS, PROMPTS, SETTINGS
from lpt_peft.cli.common.build_adapter import build_model
from lpt_peft.cli.common.messages import notice
from lpt_peft.cli.common.open_data import open_splits
from lpt_peft.cli.common.run_settings import read_settings
from lpt_peft.data.images import LabelledImages
from lpt_peft.errors import ConfigError, InputError, LPTError, MissingExtraError, StateError
from lpt_peft.recipe.compare.cells import Cell, measured
from lpt_peft.recipe.compare.figure import draw
from lpt_peft.recipe.compare.results import Comparison, Row, Run, compare
from lpt_peft.recipe.compare.table import markdown
from lpt_peft.recipe.experiment import RESULTS, write_json
from lpt_peft.recipe.predictions import PREDICTIONS, Predictions, image_names, read_predictions
from lpt_peft.recipe.resume.folders import write_errors
from lpt_peft.recipe.settings import RESUME_IGNORED_FIELDS
from lpt_peft.recipe.training.phase_init import trained_parameters

if TYPE_CHECKING:
    from lpt_peft.cli.compare import Plan

_TABLE, _FIGURE = "table.md", "compare.png"


class Comparer:
    """Checks a plan against its data and its output folder before anything is trained.

    Args:
        plan: All rows and seeds.

    Attributes:
        cells: All cells: every row with the first seed, then with the second, and so on.
        left_out: Whether a finished cell left out images that cannot be read.

    Raises:
        LPTError: The data has no such split, a row does not fit the backbone, or a folder holds another run.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self.left_out = plan, False
        self.cells = [
            Cell(row, seed, plan.output / row / f"seed{seed}") for seed in plan.seeds for row in plan.settings
        ]
        self._splits = self._open()
        for cell in self.cells:
            self._check_settings(cell)
        names = self._splits[plan.seeds[0]]["train"].class_names
        self._parameters = {row: self._count_parameters(row, names) for row in plan.settings}

    def is_finished(self, cell: Cell) -> bool:
        """Whether a cell has its predictions on the split.

        Raises:
            StateError: They are of other images than DATA has now.
        """
        if self._plan.split not in measured(cell.folder)["splits"] or not (cell.folder / PREDICTIONS).exists():
            return False
        self._predictions(cell)
        return True

    def write_results(self, failed: Mapping[Cell, str]) -> Comparison:
        """Compare the finished cells, and write the results, the table and the figure.

        Args:
            failed: Error of each failed cell.

        Raises:
            StateError: The folder is not writable.
        """
        plan = self._plan
        rows = [self._row(name, failed) for name in plan.settings]
        first = self._splits[plan.seeds[0]]["train"]
        comparison = compare(
            rows,
            first.class_counts,
            rule=next(iter(plan.settings.values())).shot_rule,
            split=plan.split,
            seeds=plan.seeds,
            baseline=plan.baseline,
            failed=[{"row": cell.row, "seed": cell.seed, "error": error} for cell, error in failed.items()],
        )
        write_json(plan.output / RESULTS, comparison.to_dict())
        with write_errors(plan.output):
            write_atomic(plan.output / _TABLE, markdown(comparison).encode("utf-8"))
            if comparison.rows:
                try:
                    draw(comparison, plan.output / _FIGURE)
                except MissingExtraError as error:
                    notice(error)
        return comparison

    def _open(self) -> dict[int, dict[str, LabelledImages]]:
        """Splits of each seed, which only differ where validation images are held out by the seed."""
        plan = self._plan
        images = next(iter(plan.settings.values())).images
        splits: dict[int, dict[str, LabelledImages]] = {}
        for seed in plan.seeds:
            same = splits and not images.validation_share
            splits[seed] = splits[plan.seeds[0]] if same else open_splits(plan.data, images, seed)
        if plan.split not in splits[plan.seeds[0]]:
            cures = {"validation": "--validation-share 0.1 or --val", "test": "--test, or --split validation"}
            raise InputError(f"{plan.data} has no {plan.split} split to compare rows on: give {cures[plan.split]}.")
        return splits

    def _check_settings(self, cell: Cell) -> None:
        """Refuse a folder whose run has other settings."""
        file = cell.folder / SETTINGS
        if not file.exists():
            return
        expected = flatten(self._plan.run(cell).to_dict())
        found = flatten(read_settings(file))
        changed = [
            f"{name} is {expected.get(name)!r:.80} now and was {found.get(name)!r:.80}"
            for name in sorted(expected.keys() & found.keys())
            if expected[name] != found[name] and name.rpartition(".")[2] not in RESUME_IGNORED_FIELDS
        ]
        if changed:
            raise StateError(
                f"{cell}: {cell.folder} holds a run with other settings: {'; '.join(changed)}. Use those settings, "
                "rename the row, remove that folder, or choose another --output."
            )

    def _count_parameters(self, row: str, class_names: list[str]) -> int:
        """Build the model of a row, which also checks that its sizes fit the backbone."""
        settings = self._plan.settings[row]
        try:
            return trained_parameters(build_model(settings, class_names), settings.training)
        except LPTError as error:
            raise ConfigError(f"row {row}: {error}") from error

    def _predictions(self, cell: Cell) -> Predictions:
        split = self._splits[cell.seed][self._plan.split]
        found = read_predictions(cell.folder / PREDICTIONS).get(self._plan.split)
        labels = torch.tensor(split.labels)
        if found is not None and found.position is not None:
            labels = labels[found.position[found.position < len(labels)]]
        if found is None or found.images != image_names(split) or not torch.equal(found.target, labels):
            raise StateError(
                f"{cell}: the predictions in {cell.folder} are not of the {self._plan.split} images that "
                f"{self._plan.data} has now. Restore the data, remove that folder, or choose another --output."
            )
        return found

    def _row(self, name: str, failed: Mapping[Cell, str]) -> Row:
        runs, sizes = [], []
        folder = MODEL if self._plan.settings[name].training.method in MODEL_METHODS else PROMPTS
        for cell in self.cells:
            if cell.row != name or cell in failed:
                continue
            record = measured(cell.folder)
            self.left_out |= record["incomplete"]
            runs.append(
                Run(
                    seed=cell.seed,
                    predictions=self._predictions(cell),
                    folder=str(cell.folder.relative_to(self._plan.output)),
                    seconds=record["seconds"],
                    peak_memory_bytes=record["peak_memory_bytes"],
                )
            )
            sizes.append(sum(file.stat().st_size for file in (cell.folder / folder).glob("*") if file.is_file()))
        size = max(sizes, default=None)
        return Row(name=name, runs=runs, trained_parameters=self._parameters[name], file_bytes=size)
