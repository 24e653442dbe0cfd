"""Choose the settings of the digits run on validation images.

Divides the non-test digits into training and validation splits in several ways, trains a row of the run with every
combination of the given values, and prints validation accuracy (mean over classes), best first, and CPU seconds. Test
images are never read.

    python examples/benchmarks/digits_search.py "LPT, phase 1" --grid shared.learning_rate=0.1,0.4 init_head=class_mean
    python examples/benchmarks/digits_search.py LPT --grid group.pool_learning_rate=0.2,2 prompts.query=final,block_k
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from lpt_peft.data.digits import DigitsLT
from lpt_peft.demo.rows import EPOCHS, Row, rows
from lpt_peft.demo.run import train_row
from lpt_peft.metrics.result import SHOTS
from lpt_peft.recipe import TrainSettings


@dataclass
class Options:
    """Row and values to search."""

    row: tyro.conf.Positional[str] = "LPT"
    """Name of the row."""
    grid: Annotated[list[str], tyro.conf.arg(metavar="NAME=VALUE,VALUE...")] = field(default_factory=list)
    """Fields of TrainSettings (`shared.` and `group.` for those of a phase), or sizes of the prompts (`prompts.`)."""
    divisions: int = 3
    epochs: int = EPOCHS


def main(options: Options) -> None:
    """Run the grid."""
    [row] = [row for row in rows(options.epochs) if row.name == options.row]
    named = [entry.partition("=")[::2] for entry in options.grid]
    grid = [[(name, _value(text)) for text in values.split(",")] for name, values in named]
    results = []
    for changes in tqdm(list(itertools.product(*grid)), desc=options.row):
        variant = changed(row, dict(changes))
        start, found = time.process_time(), []
        for division in range(1, options.divisions + 1):  # division 0 is reported
            splits = [DigitsLT(name, augment=name == "train", division=division) for name in ("train", "validation")]
            with TemporaryDirectory() as folder:
                found.append(train_row(variant, division, *splits, Path(folder), progress=False)[1])
        means = [statistics.fmean(getattr(result, shot) for result in found) for shot in SHOTS]
        spread = statistics.stdev(result.overall for result in found) if len(found) > 1 else 0.0
        results.append((means, spread, changes, (time.process_time() - start) / options.divisions))
        tqdm.write(_line(*results[-1]))
    print(f"\n{options.row}: validation, mean over classes, {options.divisions} divisions, best first")
    for result in sorted(results, key=lambda result: -result[0][0]):
        print(_line(*result))


def changed(row: Row, changes: Mapping[str, Any]) -> Row:
    """Return the row with other settings, by name."""
    values, sizes = row.settings.to_dict(), dict(row.prompts)
    for name, value in changes.items():
        group, _, key = name.rpartition(".")
        target = sizes if group == "prompts" else values[group] if group else values
        target[key] = value
    return replace(row, settings=TrainSettings.from_dict(values), prompts=sizes)


def _value(text: str) -> Any:
    with suppress(json.JSONDecodeError):
        return json.loads(text)
    return text


def _line(means: list[float], spread: float, changes: tuple[tuple[str, Any], ...], seconds: float) -> str:
    figures = "  ".join(f"{shot} {100 * mean:.1f}" for shot, mean in zip(SHOTS, means, strict=True))
    named = ", ".join(f"{name} {value}" for name, value in changes)
    return f"{figures}  spread {100 * spread:.1f}   {named}   ({seconds:.0f} CPU s each)"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
