"""Facts about the data and the settings of a run, and its final results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lpt_peft._json import flatten
from lpt_peft.errors import ConfigError
from lpt_peft.metrics.result import SHOTS
from lpt_peft.metrics.shot_rules import SHOT_NAMES
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.report.classes import Column, Table, clip, count, percent
from lpt_peft.report.comparison import method_name
from lpt_peft.report.files import RunFiles

_FIGURES = (*SHOTS, "accuracy")


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """Names and texts of the most important facts."""
    return [*_data(run), *_training(run)]


def results_table(run: RunFiles) -> Table:
    """Accuracies of each split at the end of the training."""
    columns = [Column("split", "text"), *(Column(figure, "number") for figure in _FIGURES), Column("images", "number")]
    rows = [
        [split, *(percent(result.get(figure)) for figure in _FIGURES), f"{result.get('num_images', 0):,}"]
        for split, result in run.results.items()
    ]
    return Table(columns, rows)


def settings_table(run: RunFiles) -> Table:
    """All settings, with the learning rates that were used; changed settings of the training are marked."""
    defaults = {f"training.{name}": value for name, value in flatten(TrainSettings().to_dict()).items()}
    resolved = _resolved(run.settings.get("training", {}))
    rows = [
        [
            name,
            clip(str(resolved.get(name, value)), 300),
            "changed" if name in defaults and defaults[name] != value else "",
        ]
        for name, value in flatten(run.settings).items()
    ]
    return Table([Column("setting", "text"), Column("value", "text"), Column("default", "text")], rows)


def _resolved(training: Any) -> dict[str, Any]:
    """Settings of the training with the learning rates that were used; empty for those of another version."""
    try:
        used = TrainSettings.from_dict(training).resolved().to_dict()
    except ConfigError:
        return {}
    return {f"training.{name}": value for name, value in flatten(used).items()}


def _data(run: RunFiles) -> list[tuple[str, str]]:
    classes, data = run.analysis["classes"], run.analysis["data"]
    counts, names = classes["train_images"], classes["name"]
    present = [label for label, count in enumerate(counts) if count]
    found = [
        ("Evaluated images", f"{data['images']:,} of the {data['split']} split of {clip(str(data['source']), 200)}")
    ]
    if present:
        most, least = max(present, key=counts.__getitem__), min(present, key=counts.__getitem__)
        ends = " down to ".join(f"{counts[label]:,} ({clip(names[label])})" for label in (most, least))
        ratio = f"{counts[most] / counts[least]:,.0f}"
        text = f"{sum(counts):,} of {count(len(counts), 'class')}; from {ends}, imbalance {ratio}"
        found.append(("Training images", text))
    shots = [f"{classes['shots'].count(shot):,} {shot}" for shot in SHOT_NAMES]
    found.append(("Classes by training images", f"{', '.join(shots)} ({data['shot_rule']})"))
    if empty := classes["images"].count(0):
        found.append(("Without evaluated images", f"{count(empty, 'class')}; they do not affect the accuracy"))
    if run.left_out_files:
        found.append(("Files left out", f"see left_out.json in {clip(str(run.folder), 200)}"))
    return found


def _training(run: RunFiles) -> list[tuple[str, str]]:
    settings = run.settings
    found = [("Method", method_name(run.analysis))]
    if not settings:
        return found
    training: Mapping[str, Any] = settings.get("training", {})
    prompts: Mapping[str, Any] = settings.get("prompts", {})
    found.append(("Backbone", clip(str(settings.get("backbone", "–")))))
    phases: dict[str, int] = {}
    for record in run.history:
        phases[str(record["phase"])] = phases.get(str(record["phase"]), 0) + 1
    if phases:
        found.append(("Phases", ", ".join(f"{clip(name)} {count(epochs, 'epoch')}" for name, epochs in phases.items())))
    model = run.analysis["model"]
    if model["phase"] is not None:
        length = f"{prompts.get('prompt_length', '–')} tokens per block"
        groups = "" if model["groups"] is None else f", {model['groups']} groups, {model['top_k']} for each image"
        found.append(("Prompts", f"{length}{groups}"))
    names = {
        "loss": "Loss",
        "sampling": "Sampling",
        "optimizer": "Optimizer",
        "batch_size": "Batch size",
        "seed": "Seed",
    }
    found += [(title, clip(str(training[name]))) for name, title in names.items() if name in training]
    return found
