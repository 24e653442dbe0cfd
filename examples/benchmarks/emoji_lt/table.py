"""Tables and a figure of the results of suite.py, as `lpt-peft compare` draws them.

    python table.py results.jsonl --figure docs/images/emoji.png

The tables: validation accuracy of tune.toml; rows on the test split, and on the drawing style that was never trained
on; ablations on the test split. Seconds are those of runs that share the GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _plan import ABLATIONS, ROWS, TUNE, choose

from lpt_peft.recipe.compare.figure import draw
from lpt_peft.recipe.compare.results import Comparison, Row, Run, compare
from lpt_peft.recipe.compare.table import markdown
from lpt_peft.recipe.predictions import Predictions

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """Return the finished runs; of runs that were repeated, the last."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return list({(line["stage"], line["row"], line["seed"]): line for line in lines if "error" not in line}.values())


def comparison(lines: Sequence[Line], split: str, baseline: str) -> Comparison:
    """Compare the rows among the runs, the best on the test split first."""
    rows: dict[str, list[Line]] = {}
    for line in lines:
        rows.setdefault(line["row"], []).append(line)
    order = sorted(rows.items(), key=lambda row: -mean(line["test"]["overall"] for line in row[1]))
    return compare(
        [
            Row(
                name=name,
                runs=[_run(line, split) for line in sorted(runs, key=lambda line: line["seed"])],
                trained_parameters=runs[0]["trained_parameters"],
            )
            for name, runs in order
        ],
        lines[0]["class_counts"],
        split=split,
        seeds=sorted({line["seed"] for line in lines}),
        baseline=baseline,
    )


def _run(line: Line, split: str) -> Run:
    target, prediction = (torch.tensor(line[split][name]) for name in ("target", "prediction"))
    return Run(
        seed=line["seed"],
        predictions=Predictions(target, prediction, torch.full(target.shape, torch.nan)),  # probabilities are not kept
        seconds=line["seconds"],
        peak_memory_bytes=line["peak_memory_bytes"],
    )


def tuning_table(lines: Sequence[Line]) -> str:
    """Markdown table of the balanced validation accuracy of each row of tune.toml; the best of a family in bold."""
    scores = {line["row"]: line["validation"]["overall"] for line in lines}
    best = set(choose(scores).values())
    rows = ["| family | setting | balanced validation accuracy |", "|---|---|---:|"]
    for name, score in scores.items():
        family, _, setting = name.partition(".")
        bold = "**" if name in best else ""
        rows.append(f"| {family} | {setting} | {bold}{100 * score:.1f}{bold} |")
    return "\n".join([*rows, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; draw the figure if a file is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.jsonl of suite.py")
    parser.add_argument("--baseline", default="phase1_tokens", help="row that differences are taken to")
    parser.add_argument("--figure", type=Path, help="PNG file")
    options = parser.parse_args(arguments)
    lines = read(options.results)
    stages = {stage: [line for line in lines if line["stage"] == stage] for stage in (TUNE, ROWS, ABLATIONS)}
    print(tuning_table(stages[TUNE]))
    if not stages[ROWS]:
        return
    test = comparison(stages[ROWS], "test", options.baseline)
    print(markdown(test))
    if all("shift" in line for line in stages[ROWS]):
        print(markdown(comparison(stages[ROWS], "shift", options.baseline)))
    baseline = [line for line in stages[ROWS] if line["row"] == options.baseline and line["seed"] == 0]
    if stages[ABLATIONS]:
        print(markdown(comparison([*baseline, *stages[ABLATIONS]], "test", options.baseline)))
    if options.figure is not None:
        draw(test, options.figure)


if __name__ == "__main__":
    main()
