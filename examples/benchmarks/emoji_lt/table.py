"""Tables and a figure of the results of suite.py.

    python table.py results.jsonl --output docs/images/emoji.png

Accuracies are means over classes and seeds, in %, with the standard deviation over seeds. Intervals are bootstrap
intervals over images, stratified by class (95 %); differences are paired with the baseline on the same images. "Shift"
is the drawing style that was never trained on. Seconds are those of runs that share the GPU.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _plan import ABLATIONS, ROWS, TUNE, choose

from lpt_peft.analysis import bootstrap_accuracy, bootstrap_difference

COLUMNS = (
    *("row", "balanced", "95 % interval", "many", "medium", "few", "shift", "difference [95 %]"),
    *("seeds", "trained parameters", "seconds", "memory, MiB"),
)

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """Return the finished runs; of runs that were repeated, the last."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return list({(line["stage"], line["row"], line["seed"]): line for line in lines if "error" not in line}.values())


def by_row(lines: Sequence[Line], stage: str) -> dict[str, list[Line]]:
    """Group the runs of a stage by row, in the order in which rows first finished."""
    rows: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        if line["stage"] == stage:
            rows[line["row"]].append(line)
    return {name: sorted(runs, key=lambda run: run["seed"]) for name, runs in rows.items()}


def correct(runs: Sequence[Line], split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether each prediction is correct, (S, N) bool, and the true classes, (N,)."""
    target = torch.tensor(runs[0][split]["target"])
    return torch.tensor([run[split]["prediction"] for run in runs]) == target, target


def percent(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over seeds, in %."""
    found = [100 * value for value in values if value is not None]
    spread = f" ± {stdev(found):.1f}" if len(found) > 1 else ""
    return f"{mean(found):.1f}{spread}" if found else "-"


def difference(runs: Sequence[Line], baseline: Sequence[Line], counts: Sequence[int]) -> str:
    """Paired difference of the balanced test accuracy, over the seeds that both rows have."""
    seeds = {run["seed"] for run in runs} & {run["seed"] for run in baseline}
    pairs = [[run for run in row if run["seed"] in seeds] for row in (runs, baseline)]
    if runs is baseline or not seeds:
        return "-"
    (first, target), (second, _) = (correct(row, "test") for row in pairs)
    found: Any = bootstrap_difference(first, second, target, counts)["overall"]  # the test split has images
    return f"{100 * found.estimate:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def main_table(rows: Mapping[str, list[Line]], baseline: Sequence[Line], counts: Sequence[int]) -> list[str]:
    """Markdown table of rows with predictions."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for name, runs in rows.items():
        test = [run["test"] for run in runs]
        interval: Any = bootstrap_accuracy(*correct(runs, "test"), counts)["overall"]
        shift = percent([run["shift"]["overall"] for run in runs]) if "shift" in runs[0] else "-"
        cells = [
            name,
            percent([found["overall"] for found in test]),
            f"{100 * interval.low:.1f} to {100 * interval.high:.1f}",
            *(percent([found[shots] for found in test]) for shots in ("many", "medium", "few")),
            shift,
            difference(runs, baseline, counts),
            str(len(runs)),
            f"{runs[0]['trained_parameters']:,}",
            f"{mean(run['seconds'] for run in runs):.0f}",
            str(runs[0]["peak_memory_mb"] or "-"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def tuning_table(rows: Mapping[str, list[Line]]) -> list[str]:
    """Markdown table of the balanced validation accuracy of each row of tune.toml; the best of a family in bold."""
    scores = {name: runs[0]["validation"]["overall"] for name, runs in rows.items()}
    best = set(choose(scores).values())
    lines = ["| family | setting | balanced, validation |", "|---|---|---|"]
    for name, score in scores.items():
        family, _, setting = name.partition(".")
        bold = "**" if name in best else ""
        lines.append(f"| {family} | {setting} | {bold}{100 * score:.1f}{bold} |")
    return lines


def draw(rows: Mapping[str, list[Line]], path: Path) -> None:
    """Draw balanced, few-shot and shift accuracy of each row with one dot per seed."""
    import matplotlib  # noqa: PLC0415 - only for the figure

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 0.35 * len(rows) + 1.2), sharey=True)
    order = sorted(rows, key=lambda name: mean(run["test"]["overall"] for run in rows[name]))
    kinds = (("balanced", "test", "overall"), ("few-shot", "test", "few"), ("style not trained on", "shift", "overall"))
    for axis, (title, split, shots) in zip(axes, kinds, strict=True):
        for height, name in enumerate(order):
            values = [100 * run[split][shots] for run in rows[name] if split in run]
            axis.barh(height, mean(values), color="#9ab8d6" if values else None, height=0.7)
            axis.plot(values, [height] * len(values), "o", color="#24435f", markersize=3)
        axis.set_title(f"{title}, %", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_yticks(range(len(order)), order, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; draw the figure if a file is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.jsonl of suite.py")
    parser.add_argument("--baseline", default="phase1_random", help="row that differences are taken to")
    parser.add_argument("--output", type=Path, help="PNG file")
    options = parser.parse_args(arguments)
    lines = read(options.results)
    tune, rows, ablations = (by_row(lines, stage) for stage in (TUNE, ROWS, ABLATIONS))
    if tune:
        print("\n".join([*tuning_table(tune), ""]))
    if not rows:
        return
    if options.baseline not in rows:
        parser.error(f"--baseline {options.baseline} is none of the finished rows: {', '.join(rows)}.")
    some = next(iter(rows.values()))[0]
    counts, baseline = some["class_counts"], rows[options.baseline]
    print(f"{some['rule']}.\n")
    for group in (rows, ablations):
        if group:
            print("\n".join([*main_table(group, baseline, counts), ""]))
    if options.output is not None:
        draw(rows, options.output)


if __name__ == "__main__":
    main()
