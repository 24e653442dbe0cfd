"""Figures and paired differences of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lpt_peft._json import flatten
from lpt_peft.analysis import bootstrap_difference
from lpt_peft.errors import InputError
from lpt_peft.metrics.result import SHOTS
from lpt_peft.metrics.shot_rules import SHOT_RULES
from lpt_peft.report.classes import Column, Table, by_frequency, clip, percent, points, with_interval
from lpt_peft.report.files import RunFiles

Differences = Mapping[str, Mapping[str, Mapping[str, float] | None]]


def run_names(runs: Sequence[RunFiles]) -> list[str]:
    """Names that distinguish the runs: those of the folders, or as much of their paths as is needed."""
    paths = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{runs[0].folder} is given twice. Name different runs.")


def accuracy_table(runs: Sequence[RunFiles], names: Sequence[str]) -> Table:
    """Accuracies with their intervals."""
    rows = [
        [clip(name, 120), *(with_interval(run.analysis["accuracy"][shot]) for shot in SHOTS)]
        for run, name in zip(runs, names, strict=True)
    ]
    return Table([Column("run", "text"), *(Column(shot, "number") for shot in SHOTS)], rows)


def figures_table(runs: Sequence[RunFiles], names: Sequence[str]) -> Table:
    """Method, backbone, and figures without intervals."""
    columns = [Column("run", "text"), Column("method", "text"), Column("backbone", "text")]
    columns += [Column("classes never right", "number"), Column("gap of the probabilities", "number")]
    columns += [Column("1-NN of the features", "number"), Column("evaluated images", "number")]
    rows = []
    for run, name in zip(runs, names, strict=True):
        analysis = run.analysis
        rows.append(
            [
                clip(name, 120),
                method_name(analysis),
                clip(str(run.settings.get("backbone", "–"))),
                f"{len(analysis['weak']['never_right']):,}",
                percent(analysis["calibration"]["before"]["overall"]["error"]),
                percent(_nearest(analysis)),
                f"{analysis['data']['images']:,} {analysis['data']['split']}",
            ]
        )
    return Table(columns, rows)


def method_name(analysis: Mapping[str, Any]) -> str:
    """Method and phase of a model."""
    model = analysis["model"]
    if model["method"] != "lpt":
        return clip(str(model["method"]))
    return "lpt, shared prompt only" if model["groups"] is None else f"lpt, {model['groups']} groups"


def differences(runs: Sequence[RunFiles], names: Sequence[str]) -> tuple[Differences, dict[str, str]]:
    """Accuracy of each further run minus that of the first, on the same images, with 95 % intervals.

    Returns:
        Differences "overall", "many", "medium" and "few" by name of the run, and the reasons by name of the runs that
        cannot be compared.
    """
    found, reasons = {}, {}
    for run, name in zip(runs[1:], names[1:], strict=True):
        difference = _difference(run, runs[0])
        if isinstance(difference, str):
            reasons[name] = difference
        else:
            found[name] = difference
    return found, reasons


def differences_table(found: Differences) -> Table:
    """Differences as a table."""
    rows = [
        [clip(name, 120), *(with_interval(interval, points) for interval in difference.values())]
        for name, difference in found.items()
    ]
    return Table([Column("run", "text"), *(Column(shot, "number") for shot in SHOTS)], rows)


def classes_table(runs: Sequence[RunFiles], names: Sequence[str]) -> Table | None:
    """Accuracy of each class in every run, frequent classes first; None if the runs have different classes."""
    first = runs[0].analysis["classes"]
    if any(run.analysis["classes"]["name"] != first["name"] for run in runs):
        return None
    columns = [Column("class", "text"), Column("training images", "number"), Column("shot", "shot")]
    columns += [Column(clip(name), "number") for name in names] + [Column("largest difference", "number")]
    rows = []
    for label in by_frequency(first):
        values = [run.analysis["classes"]["accuracy"][label] for run in runs]
        known = [value for value in values if value is not None]
        rows.append(
            [
                clip(first["name"][label]),
                f"{first['train_images'][label]:,}",
                first["shots"][label],
                *map(percent, values),
                points(max(known) - min(known), sign=False) if known else "–",
            ]
        )
    return Table(columns, rows)


def settings_table(runs: Sequence[RunFiles], names: Sequence[str]) -> Table:
    """Settings that differ between the runs."""
    flat = [flatten(run.settings) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [[key, *(str(values.get(key, "–")) for values in flat)] for key in keys]
    rows = [[clip(cell, 120) for cell in row] for row in rows if len(set(row[1:])) > 1]
    return Table([Column("setting", "text"), *(Column(clip(name), "text") for name in names)], rows)


def _difference(run: RunFiles, first: RunFiles) -> dict[str, dict[str, float] | None] | str:
    split = first.analysis["data"]["split"]
    own, base = run.predictions.get(split), first.predictions.get(split)
    if own is None or base is None:
        return f"a run stored no predictions on the {split} images"
    positions = [torch.arange(len(p.target)) if p.position is None else p.position for p in (own, base)]
    same = own.images == base.images and torch.equal(*positions) and torch.equal(own.target, base.target)
    counts = first.analysis["classes"]["train_images"]
    if not same or len(counts) != len(run.analysis["classes"]["train_images"]):
        return f"its {split} images are not those of the first run"
    rule = SHOT_RULES.get(first.settings.get("shot_rule", "lpt"), SHOT_RULES["lpt"])
    draws = first.analysis["accuracy"].get("draws", 10_000)
    found = bootstrap_difference(own.correct, base.correct, own.target, counts, rule, draws=draws)
    intervals = {shot: found[shot] for shot in SHOTS}
    return {shot: None if interval is None else interval._asdict() for shot, interval in intervals.items()}


def _nearest(analysis: Mapping[str, Any]) -> float | None:
    rows = [row["knn_1"]["balanced_accuracy"] for row in analysis.get("features", {}).values() if row.get("knn_1")]
    return rows[-1] if rows else None
