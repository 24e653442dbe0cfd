"""Results of a comparison: mean, spread, intervals and paired differences, as a table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lpt_peft._version import __version__
from lpt_peft.analysis.bootstrap import Interval, bootstrap_accuracy, bootstrap_difference, default_draws
from lpt_peft.errors import InputError
from lpt_peft.metrics.result import SHOTS, ShotResult, counts_by_class, shot_metrics
from lpt_peft.metrics.shot_rules import SHOT_RULES
from lpt_peft.recipe.predictions import Predictions

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One accuracy of a row over its seeds, as fractions."""

    mean: float
    spread: float | None
    """Standard deviation over the seeds, with n - 1 degrees of freedom; None for a single seed."""
    interval: tuple[float, float]
    """Class-stratified bootstrap interval of the mean, over test images."""
    difference: Interval | None = None
    """Mean minus that of the baseline on the same images, over the seeds of both; None without a baseline."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished cell."""

    seed: int
    predictions: Predictions
    folder: str = ""
    seconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row with its finished runs, at least one."""

    name: str
    runs: Sequence[Run]
    trained_parameters: int | None = None
    file_bytes: int | None = None
    figures: Mapping[str, Figure | None] = field(default_factory=dict)
    results: Sequence[ShotResult] = ()
    """Shot metrics of each run."""

    @property
    def seconds(self) -> float | None:
        """Mean over the runs; None if the time of a run is unknown."""
        times = [run.seconds for run in self.runs]
        return None if None in times else statistics.fmean(time for time in times if time is not None)

    @property
    def peak_memory_bytes(self) -> int | None:
        """Largest over the runs."""
        return max((run.peak_memory_bytes for run in self.runs if run.peak_memory_bytes is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Results of all rows."""

    rows: Sequence[Row]
    split: str
    rule: str
    seeds: Sequence[int]
    baseline: str | None
    images: int
    draws: int
    failed: Sequence[Mapping[str, Any]] = ()
    """Row, seed and error of the cells that failed."""

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for strict JSON."""
        return {
            "format_version": 1,
            "split": self.split,
            "rule": self.rule,
            "seeds": list(self.seeds),
            "baseline": self.baseline,
            "images": self.images,
            "interval": {"level": LEVEL, "draws": self.draws, "method": "class-stratified percentile bootstrap"},
            "rows": [_row_dict(row) for row in self.rows],
            "failed": [dict(cell) for cell in self.failed],
            "library_version": __version__,
        }


def compare(
    rows: Sequence[Row],
    class_counts: Sequence[int],
    *,
    rule: str = "lpt",
    split: str = "test",
    seeds: Sequence[int] = (),
    baseline: str | None = None,
    failed: Sequence[Mapping[str, Any]] = (),
) -> Comparison:
    """Compute the figures of all rows.

    Args:
        rows: Rows with their finished runs; rows without a run are left out.
        class_counts: Training images of each class, (C,) integers.
        rule: A name of `lpt_peft.metrics.SHOT_RULES`.
        split: Name of the split, for the results.
        seeds: Seeds of the comparison, for the results.
        baseline: Row of the paired differences; None: no differences. Seeds that both rows finished are compared.
        failed: Row, seed and error of the cells that failed.

    Raises:
        InputError: Two runs of the same seed were evaluated on different images.
    """
    rows = [row for row in rows if row.runs]
    draws = default_draws(len(class_counts))
    found = [_with_figures(row, class_counts, rule, draws) for row in rows]
    base = next((row for row in found if row.name == baseline), None)
    if base is not None:
        found = [row if row is base else _with_difference(row, base, class_counts, rule, draws) for row in found]
    return Comparison(
        rows=found,
        split=split,
        rule=found[0].results[0].rule if found else str(SHOT_RULES[rule]),
        seeds=list(seeds),
        baseline=None if base is None else base.name,
        images=len(found[0].runs[0].predictions.target) if found else 0,
        draws=draws,
        failed=failed,
    )


def _with_figures(row: Row, class_counts: Sequence[int], rule: str, draws: int) -> Row:
    results = [_shot_result(run.predictions, class_counts, rule) for run in row.runs]
    correct, target = _stack(row.runs)
    intervals = bootstrap_accuracy(correct, target, class_counts, SHOT_RULES[rule], draws=draws, level=LEVEL)
    figures: dict[str, Figure | None] = {}
    for shot, interval in intervals.items():
        values = [value for result in results if (value := getattr(result, shot)) is not None]
        if interval is None or not values:
            figures[shot] = None
            continue
        spread = statistics.stdev(values) if len(values) > 1 else None
        figures[shot] = Figure(mean=statistics.fmean(values), spread=spread, interval=interval[1:])
    return _changed(row, figures=figures, results=results)


def _with_difference(row: Row, base: Row, class_counts: Sequence[int], rule: str, draws: int) -> Row:
    pairs = [(run, other) for run in row.runs for other in base.runs if run.seed == other.seed]
    if not pairs:
        return row
    for run, other in pairs:
        if not _same_images(run.predictions, other.predictions):
            raise InputError(
                f"{row.name} and {base.name}, seed {run.seed}, were evaluated on different images, so their accuracies "
                "cannot be compared in pairs. Run both again on the same data, in another folder."
            )
    correct, target = _stack([run for run, _ in pairs])
    baseline, _ = _stack([other for _, other in pairs])
    found = bootstrap_difference(correct, baseline, target, class_counts, SHOT_RULES[rule], draws=draws, level=LEVEL)
    figures = {
        shot: None if figure is None else Figure(**{**vars(figure), "difference": found[shot]})
        for shot, figure in row.figures.items()
    }
    return _changed(row, figures=figures)


def _stack(runs: Sequence[Run]) -> tuple[torch.Tensor, Any]:
    """Correct predictions (S, N), and classes: (N,) for the same images, otherwise (S, N)."""
    correct = torch.stack([run.predictions.correct for run in runs])
    if all(_same_images(run.predictions, runs[0].predictions) for run in runs[1:]):
        return correct, runs[0].predictions.target
    return correct, torch.stack([run.predictions.target for run in runs])


def _same_images(first: Predictions, second: Predictions) -> bool:
    positions = (first.position, second.position)
    same = all(position is None for position in positions) or (
        positions[0] is not None and positions[1] is not None and torch.equal(positions[0], positions[1])
    )
    return same and first.images == second.images and torch.equal(first.target, second.target)


def _shot_result(predictions: Predictions, class_counts: Sequence[int], rule: str) -> ShotResult:
    correct, total = counts_by_class(predictions.target, predictions.prediction, len(class_counts))
    return shot_metrics(correct, total, class_counts, SHOT_RULES[rule])


def _changed(row: Row, **changes: Any) -> Row:
    return Row(**{**vars(row), **changes})


def _row_dict(row: Row) -> dict[str, Any]:
    runs = [
        {
            "seed": run.seed,
            "folder": run.folder,
            **{shot: getattr(result, shot) for shot in SHOTS},
            "seconds": run.seconds,
            "peak_memory_bytes": run.peak_memory_bytes,
        }
        for run, result in zip(row.runs, row.results, strict=True)
    ]
    return {
        "name": row.name,
        "figures": {shot: None if figure is None else _figure_dict(figure) for shot, figure in row.figures.items()},
        "seconds": row.seconds,
        "trained_parameters": row.trained_parameters,
        "file_bytes": row.file_bytes,
        "peak_memory_bytes": row.peak_memory_bytes,
        "runs": runs,
    }


def _figure_dict(figure: Figure) -> dict[str, Any]:
    difference = figure.difference
    return {
        "mean": figure.mean,
        "spread": figure.spread,
        "interval": list(figure.interval),
        "difference": None if difference is None else {"mean": difference.estimate, "interval": list(difference[1:])},
    }
