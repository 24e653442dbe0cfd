"""Results of the digits run, as a table and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from lpt_peft._version import __version__
from lpt_peft.data.digits import digits_counts
from lpt_peft.metrics import ShotResult
from lpt_peft.metrics.result import SHOTS


@dataclass
class RowResult:
    """Results of a row over seeds."""

    name: str
    trained_parameters: int
    file_bytes: int | None = None
    results: list[ShotResult] = field(default_factory=list)

    def mean(self, figure: str) -> float:
        """Return the mean over seeds of `overall`, `many`, `medium` or `few`."""
        return statistics.fmean(getattr(result, figure) for result in self.results)

    def spread(self, figure: str) -> float | None:
        """Return the standard deviation over seeds; None for a single seed."""
        values = [getattr(result, figure) for result in self.results]
        return statistics.stdev(values) if len(values) > 1 else None

    def per_class(self) -> list[float]:
        """Return the accuracy of each class, mean over seeds."""
        return [statistics.fmean(values) for values in zip(*(r.per_class for r in self.results), strict=True)]


@dataclass
class DemoResult:
    """Results of the digits run."""

    rows: list[RowResult]
    groups_per_class: list[list[float]]
    """Share of the test images of each class (row) for which each group (column) was chosen; LPT, first seed."""
    dead_groups: list[int]
    rule: str
    seeds: list[int]
    epochs: int
    seconds: float
    prompt_file: str

    def gain_of_groups(self) -> float:
        """Return the overall accuracy of LPT minus that of phase 1 alone with the same number of passes."""
        phase_1, lpt = self.rows[-2:]
        return lpt.mean("overall") - phase_1.mean("overall")

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        table = [
            {
                "name": row.name,
                "trained_parameters": row.trained_parameters,
                "file_bytes": row.file_bytes,
                **{shot: {"mean": row.mean(shot), "spread": row.spread(shot)} for shot in SHOTS},
                "per_class": row.per_class(),
                "results": [result.to_dict() for result in row.results],
            }
            for row in self.rows
        ]
        about = {name: value for name, value in vars(self).items() if name != "rows"}
        counts = digits_counts()
        gain = self.gain_of_groups()
        return {"rows": table, "gain_of_groups": gain, **about, "class_counts": counts, "library_version": __version__}

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return header and rows: percent, mean and spread over seeds."""
        header = ("", *SHOTS, "parameters", "file")
        rows = [
            (
                row.name,
                *(_percent(row.mean(shot), row.spread(shot)) for shot in SHOTS),
                f"{row.trained_parameters:,}",
                f"{row.file_bytes / 1024:,.0f} KiB" if row.file_bytes else "-",
            )
            for row in self.rows
        ]
        return header, rows


def _percent(mean: float, spread: float | None) -> str:
    return f"{100 * mean:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")
