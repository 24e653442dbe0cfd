"""Rows of the TOML files, and the settings that tuning passes on to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomllib

TUNE, ROWS, ABLATIONS = "tune", "rows", "ablations"  # stages, each with a file of that name
STARTS = ("phase1_random", "phase1_tokens")  # families of phase 1

Settings = dict[str, Any]  # of a row, with nested "shared" and "group"
Cell = dict[str, Any]  # stage, row, seed and settings of a run


def read_rows(path: Path) -> dict[str, Settings]:
    """Return the settings of each row: those of [defaults], overridden by the row's."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: merged(content.get("defaults", {}), row) for name, row in content["rows"].items()}


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    """Return the settings with changes; nested tables are merged."""
    result = dict(settings)
    for name, value in changes.items():
        result[name] = merged(result.get(name, {}), value) if isinstance(value, Mapping) else value
    return result


def rates(settings: Settings) -> Settings:
    """Select the settings that tuning chooses: start, optimizer, learning rates and weight decay, of both phases."""
    phase = {"head_learning_rate": "None", **settings["shared"]}
    phase.pop("epochs", None)
    start = {"init_prompts": settings["init_prompts"]} if "init_prompts" in settings else {}
    return {"optimizer": settings.get("optimizer", "sgd"), **start, "shared": phase, "group": phase}


def family_of(row: Settings, winner: str) -> str:
    """Return the family of tune.toml that a row takes its settings from; `winner` is the better start of phase 1."""
    method = row.get("method", "lpt")
    if method == "linear_probe":
        return "probe_" + {"cross_entropy": "ce", "logit_adjusted": "la"}.get(row.get("loss", "lpt"), "agcl")
    if method != "lpt":
        return str(method).removeprefix("vpt_")
    return f"phase1_{row['init_prompts']}" if "init_prompts" in row else winner


def choose(scores: Mapping[str, float]) -> dict[str, str]:
    """Return the row with the best score of each family."""
    best: dict[str, str] = {}
    for name in sorted(scores, key=lambda name: -scores[name]):
        best.setdefault(name.partition(".")[0], name)
    return best


def tuned(
    rows: Mapping[str, Settings], tune: Mapping[str, Settings], scores: Mapping[str, float]
) -> dict[str, Settings]:
    """Return the rows with the settings that have the best scores; a family without a score changes nothing."""
    best = choose(scores)
    winner = max(STARTS, key=lambda family: scores.get(best.get(family, ""), -1.0))
    families = {name: family_of(row, winner) for name, row in rows.items()}
    return {
        name: merged(row, rates(tune[best[families[name]]])) if families[name] in best else dict(row)
        for name, row in rows.items()
    }


def cells(stage: str, rows: Mapping[str, Settings], seeds: Sequence[int]) -> list[Cell]:
    """Return the runs of a stage, seed by seed."""
    return [{"stage": stage, "row": n, "seed": s, "settings": row} for s in seeds for n, row in rows.items()]


def epochs(cell: Cell) -> int:
    """Return the epochs of a run, at least 1."""
    settings = cell["settings"]
    phases = ("group",) if settings.get("phases") == "joint" else ("shared", "group")
    return max(1, sum(settings.get(phase, {}).get("epochs", 0) for phase in phases))
