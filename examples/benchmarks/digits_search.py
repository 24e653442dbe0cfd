"""Choose the settings of the digits run on validation images.

Divides the non-test digits into training and validation splits in several ways, trains a row of the run with every
combination of the given values, and prints validation accuracy (mean over classes), best first. Test images are never
read.

    python examples/benchmarks/digits_search.py --row "LPT, phase 1" --shared-learning-rate 2 4 8
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import tyro
from tqdm import tqdm

from lpt_peft.data.digits import DigitsLT
from lpt_peft.demo.rows import EPOCHS, rows
from lpt_peft.demo.run import train_row


@dataclass
class Settings:
    """Row and values to search."""

    row: str = "LPT"
    shared_epochs: list[int] = field(default_factory=list)
    shared_learning_rate: list[float] = field(default_factory=list)
    shared_weight_decay: list[float] = field(default_factory=list)
    group_epochs: list[int] = field(default_factory=list)
    group_learning_rate: list[float] = field(default_factory=list)
    group_weight_decay: list[float] = field(default_factory=list)
    init_groups: list[Literal["shared", "random"]] = field(default_factory=list)
    batch_size: list[int] = field(default_factory=list)
    """Images of a step, both halves."""
    divisions: int = 3
    epochs: int = EPOCHS


def main(settings: Settings) -> None:
    """Run the grid."""
    [row] = [row for row in rows(settings.epochs) if row.name == settings.row]
    names = [name for name in vars(settings) if isinstance(getattr(settings, name), list) and getattr(settings, name)]
    results = []
    grid = list(itertools.product(*(getattr(settings, name) for name in names)))
    for values in tqdm(grid, desc=settings.row):
        changed = row.settings
        for name, value in zip(names, values, strict=True):
            phase, _, key = name.partition("_")
            if phase in ("shared", "group"):
                name, value = phase, replace(getattr(changed, phase), **{key: value})  # noqa: PLW2901
            changed = replace(changed, **{name: value})
        start = time.perf_counter()
        found = []
        for division in range(1, settings.divisions + 1):  # division 0 is reported
            splits = [DigitsLT(name, augment=name == "train", division=division) for name in ("train", "validation")]
            with TemporaryDirectory() as folder:
                variant = replace(row, settings=changed)
                found.append(train_row(variant, division, *splits, Path(folder), progress=False)[1])
        means = [statistics.fmean(getattr(r, shot) for r in found) for shot in ("overall", "many", "medium", "few")]
        results.append((means, values, (time.perf_counter() - start) / settings.divisions))
        tqdm.write(_line(names, *results[-1]))
    print(f"\n{settings.row}: validation, mean over classes, {settings.divisions} divisions, best first")
    for result in sorted(results, key=lambda result: -result[0][0]):
        print(_line(names, *result))


def _line(names: list[str], means: list[float], values: tuple[object, ...], seconds: float) -> str:
    changes = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    shots = zip(("all", "many", "medium", "few"), means, strict=True)
    figures = "  ".join(f"{shot} {100 * mean:.1f}" for shot, mean in shots)
    return f"{figures}   {changes}   ({seconds:.0f} s each)"


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
