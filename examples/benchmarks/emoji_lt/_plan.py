"""The runs of the suite, and the settings that tuning passes on to later rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lpt_peft.cli.common.rows import Rows, default_settings
from lpt_peft.cli.common.run_settings import RunSettings
from lpt_peft.recipe import TrainSettings

TUNE, ROWS, ABLATIONS = "tune", "rows", "ablations"  # stages, each with a file of that name

Settings = dict[str, Any]  # of a row, as in a TOML file


@dataclass(frozen=True)
class Cell:
    """A run: a row with a seed."""

    stage: str
    row: str
    seed: int
    run: RunSettings

    @property
    def epochs(self) -> int:
        """Epochs of all phases."""
        return sum(phase.epochs for phase in self.run.training.plan.values())

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON, which identifies the run."""
        return {"stage": self.stage, "row": self.row, "seed": self.seed, "settings": self.run.to_dict()}


def cells(stage: str, rows: Rows, seeds: Sequence[int]) -> list[Cell]:
    """Return the runs of a stage, seed by seed.

    Raises:
        ConfigError: A setting is unknown or out of range.
    """
    settings = rows.settings(default_settings(rows))
    return [
        Cell(stage, name, seed, replace(run, training=replace(run.training, seed=seed)))
        for seed in seeds
        for name, run in settings.items()
    ]


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    """Return the settings with changes; nested tables are merged."""
    result = dict(settings)
    for name, value in changes.items():
        result[name] = merged(result.get(name, {}), value) if isinstance(value, Mapping) else value
    return result


def rates(settings: Mapping[str, Any]) -> Settings:
    """Select the settings that tuning chooses: start, optimizer, learning rates and weight decay, of both phases."""
    phase = {"head_learning_rate": "None", **settings["shared"]}
    phase.pop("epochs", None)
    start = {"init_prompts": settings["init_prompts"]} if "init_prompts" in settings else {}
    return {"optimizer": settings.get("optimizer", TrainSettings().optimizer), **start, "shared": phase, "group": phase}


def family_of(row: Mapping[str, Any]) -> str:
    """Return the family of tune.toml that a row takes its settings from."""
    method = row.get("method", "lpt")
    if method == "linear_probe":
        return "probe_" + {"cross_entropy": "ce", "logit_adjusted": "la"}.get(row.get("loss", "lpt"), "agcl")
    if method == "lpt":
        return f"phase1_{row.get('init_prompts', TrainSettings().init_prompts)}"
    return str(method).removeprefix("vpt_")


def choose(scores: Mapping[str, float]) -> dict[str, str]:
    """Return the row with the best score of each family."""
    best: dict[str, str] = {}
    for name in sorted(scores, key=lambda name: -scores[name]):
        best.setdefault(name.partition(".")[0], name)
    return best


def tuned(rows: Rows, tune: Rows, scores: Mapping[str, float]) -> Rows:
    """Return the rows with the settings that have the best scores; a family without a score changes nothing.

    A rate of the group prompts keeps its ratio to the learning rate.
    """
    best, changed = choose(scores), {}
    for name, row in rows.rows.items():
        family = family_of({**rows.defaults, **row})
        if family not in best:
            changed[name] = dict(row)
            continue
        chosen = rates(merged(tune.defaults, tune.rows[best[family]]))
        if "pool_learning_rate" in (group := row.get("group", {})):
            ratio = group["pool_learning_rate"] / group["learning_rate"]
            chosen = merged(chosen, {"group": {"pool_learning_rate": ratio * chosen["group"]["learning_rate"]}})
        changed[name] = merged(row, chosen)
    return replace(rows, rows=changed)


def to_toml(rows: Rows) -> str:
    """Return the rows as a file for `lpt-peft compare`."""
    tables = {"defaults": rows.defaults, **{f'rows."{name}"': row for name, row in rows.rows.items()}}
    text = "" if rows.baseline is None else f'baseline = "{rows.baseline}"\n'
    for title, table in tables.items():
        text += f"\n[{title}]\n" + "".join(f"{key} = {_value(value)}\n" for key, value in table.items())
    return text


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)  # text, numbers and lists are written alike in TOML
