"""The files of a finished run that a report needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lpt_peft._json import loads, parse
from lpt_peft.errors import InputError, StateError
from lpt_peft.metrics.result import counts_by_class
from lpt_peft.recipe.analyse import ANALYSIS, ANALYSIS_FOLDER
from lpt_peft.recipe.experiment import HISTORY, LEFT_OUT, RESULTS
from lpt_peft.recipe.predictions import PREDICTIONS, Predictions, read_predictions
from lpt_peft.report.partial import partial_analysis

SETTINGS = "settings.json"
_SAME = 0.01  # share of images whose predictions may differ between devices
_SECTIONS = ("model", "data", "left_out", "classes", "accuracy", "weak", "confused_pairs", "calibration")
_COLUMNS = ("name", "train_images", "shots", "images", "correct", "accuracy", "confused_with", "confused_images")


@dataclass(frozen=True)
class RunFiles:
    """Content of the output folder of a run."""

    folder: Path
    analysis: Mapping[str, Any]
    """See `lpt_peft.recipe.analyse.analyse`."""
    results: Mapping[str, Any]
    """Metrics by split."""
    history: list[Mapping[str, Any]] = field(default_factory=list)
    """A record per epoch."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    predictions: Mapping[str, Predictions] = field(default_factory=dict)
    """By split."""
    left_out_files: Mapping[str, Any] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    """Reason and cure by the part of the report that is left out."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name


def read_run(folder: Path, *, analysis: Mapping[str, Any] | None = None, partial: bool = False) -> RunFiles:
    """Read the files of a run.

    Args:
        folder: Output folder of `lpt-peft train` or `fit`.
        analysis: Result of `analyse`; None reads that of the folder.
        partial: If there is no analysis, describe the stored predictions instead.

    Raises:
        InputError: The folder is not the output folder of a run.
        StateError: The run is not finished, it was not analysed, or a file is damaged.
    """
    results = check_finished(folder)
    missing: dict[str, str] = {}

    def optional(name: str, section: str, cure: str, read: Callable[[Path], Any], default: Any) -> Any:
        if not (folder / name).is_file():
            missing[section] = f"{folder / name} does not exist. {cure}"
            return default
        return read(folder / name)

    again = "Run the same lpt-peft train command again, which resumes the run and writes it."
    predictions = optional(PREDICTIONS, "mistakes", again, read_predictions, {})
    settings = optional(SETTINGS, "settings", "Only lpt-peft train writes it.", _object, {})
    path = folder / ANALYSIS_FOLDER / ANALYSIS
    if analysis is None and path.is_file():
        analysis = _checked_analysis(_object(path), path)
        if _differs(analysis, predictions):
            missing["analysis"] = (
                f"{path} is not of the predictions that the run stored: other images were analysed, or the run was "
                "trained again. The analysis is reported; lpt-peft analyse writes it again."
            )
    elif analysis is None and partial:
        analysis = partial_analysis(folder, predictions, settings)
    elif analysis is None:
        raise StateError(
            f"{path} does not exist: the run was not analysed. Run lpt-peft analyse {folder}, or report its stored "
            "predictions alone with --no-analysis."
        )
    return RunFiles(
        folder=folder,
        analysis=analysis,
        results=results,
        history=optional(HISTORY, "curves", again, _history, []),
        settings=settings,
        predictions=predictions,
        left_out_files=_object(folder / LEFT_OUT) if (folder / LEFT_OUT).is_file() else {},
        missing=missing,
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is the output folder of a run, which may be unfinished."""
    return any((folder / name).is_file() for name in (RESULTS, SETTINGS))


def check_finished(folder: Path) -> dict[str, Any]:
    """Return results.json of a finished run.

    Raises:
        InputError: The folder is not the output folder of a run.
        StateError: The run is not finished, or the file is damaged.
    """
    if (folder / RESULTS).is_file():
        results = _object(folder / RESULTS)
        if "rows" not in results:
            return results
        runs = sorted(path.parent for path in (*folder.glob(f"*/{RESULTS}"), *folder.glob(f"*/*/{RESULTS}")))
        named = f", such as {runs[0]}" if runs else ""
        raise InputError(f"{folder} is the output folder of a comparison. Name the runs in it{named}.")
    if (folder / SETTINGS).is_file():
        raise StateError(
            f"{folder} has no {RESULTS}: its training was interrupted. The same lpt-peft train command resumes it."
        )
    problem = f"has no {RESULTS}" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
    raise InputError(f"{folder} {problem}: give the output folder of lpt-peft train.")


def analysed_source(folder: Path) -> str | None:
    """The images that the analysis of a run is of; None if it was not analysed, or was trained again since.

    Raises:
        StateError: A file is damaged.
    """
    path = folder / ANALYSIS_FOLDER / ANALYSIS
    if not path.is_file():
        return None
    analysis = _checked_analysis(_object(path), path)
    predictions = read_predictions(folder / PREDICTIONS) if (folder / PREDICTIONS).is_file() else {}
    settings = _object(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    source = str(analysis["data"]["source"])
    return None if source == settings.get("data") and _differs(analysis, predictions) else source


def _differs(analysis: Mapping[str, Any], predictions: Mapping[str, Predictions]) -> bool:
    """Whether an analysis is not of the stored predictions; another device may change a few predictions."""
    classes, found = analysis["classes"], predictions.get(analysis["data"]["split"])
    if found is None:
        return False
    correct, images = counts_by_class(found.target, found.prediction, len(classes["name"]))
    if len(images) != len(classes["images"]) or images.tolist() != classes["images"]:
        return True
    changed = int((correct - torch.tensor(classes["correct"])).abs().sum())
    return changed > max(1, _SAME * len(found.target))


def _object(path: Path) -> dict[str, Any]:
    try:
        return loads(path.read_bytes(), str(path), StateError)
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}. Change its permissions.") from error


def _history(path: Path) -> list[Mapping[str, Any]]:
    cure = "Remove it and run the same lpt-peft train command again."
    try:
        records = parse(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(f"{path} cannot be read: {error}. {cure}") from error
    keys = {"phase", "epoch", "loss"}
    if not isinstance(records, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in records):
        raise StateError(f"{path} must be a list of records with {', '.join(sorted(keys))}. {cure}")
    return records


def _checked_analysis(analysis: dict[str, Any], path: Path) -> dict[str, Any]:
    """The analysis, if it has the sections that every report needs."""
    problem = ""
    classes = analysis.get("classes")
    if analysis.get("format_version") != 1:
        problem = f"has format {json.dumps(analysis.get('format_version'))[:80]}, not 1"
    elif absent := [name for name in _SECTIONS if name not in analysis]:
        problem = f"lacks {', '.join(absent)}"
    elif not isinstance(classes, dict) or not all(isinstance(classes.get(name), list) for name in _COLUMNS):
        problem = f"must have lists {', '.join(_COLUMNS)} in classes"
    elif len({len(classes[name]) for name in _COLUMNS}) > 1 or not classes["name"]:
        problem = "has lists of classes of different lengths"
    if problem:
        raise StateError(f"{path} {problem}. Write it again: lpt-peft analyse {path.parents[1]}.")
    return analysis
