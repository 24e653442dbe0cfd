"""Results on the card: accuracies of the training record, and details of `results.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult

from lpt_peft._json import (
    BrokenRule,
    Rule,
    integer,
    list_of,
    mapping_of,
    nullable,
    number,
    object_of,
    one_of,
    require,
    text,
)
from lpt_peft.checkpoint import PromptContent
from lpt_peft.config import MAX_CLASSES
from lpt_peft.errors import InputError
from lpt_peft.hub.card.markdown import code, line, percent, table
from lpt_peft.metrics.result import SHOTS
from lpt_peft.metrics.shot_rules import SHOT_NAMES

_ACCURACIES = SHOTS  # besides names that end with "accuracy"
_SPLITS = ("test", "validation")


def _share(value: Any, path: str) -> None:
    number(value, path)
    require(0 <= value <= 1, value, path, "from 0 to 1")


_ROW = {
    "name": text,
    "train_images": integer(0),
    "shot": one_of(*SHOT_NAMES),
    "images": integer(0),
    "correct": integer(0),
    **dict.fromkeys(("accuracy", "low", "high"), nullable(_share)),
}
_DETAILS: Mapping[str, Rule] = {
    "classes": list_of(object_of(_ROW), 1, MAX_CLASSES),
    "intervals": mapping_of(nullable(list_of(_share, 2, 2)), most=8),
    "calibration_error": mapping_of(nullable(_share), most=8),
    "never_right": integer(0),
    "num_images": integer(0),
}


def results_of_split(content: PromptContent, results: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The details of the split that the card shows, checked against the prompt file.

    Args:
        content: The prompt file, with the accuracies of its run in `training["metrics"]`.
        results: `results.json` of the run; None if there is none.

    Raises:
        InputError: The results are incomplete, or those of other prompts.
    """
    if results is None:
        return None
    metrics: Any = content.metadata.training.get("metrics")
    split = split_of(metrics)
    if split is None or not isinstance(results.get(split), dict):
        raise InputError(_broken("they lack the split whose accuracies the prompt file records"))
    found = {name: results[split].get(name) for name in _DETAILS}
    if isinstance(rows := found["classes"], list):
        found["classes"] = [{key: row.get(key) for key in _ROW} if isinstance(row, dict) else row for row in rows]
    try:
        for name, rule in _DETAILS.items():
            rule(found[name], f"{split}.{name}")
    except BrokenRule as error:
        raise InputError(_broken(f"they are incomplete or were changed: {error}")) from error
    names = content.metadata.label_names or ()
    same = all(results[split].get(name) == metrics[split].get(name) for name in _ACCURACIES)
    if not same or names != tuple(row["name"] for row in found["classes"]):
        raise InputError(_broken("they describe other prompts: accuracies or classes differ from the prompt file"))
    return {"split": split, **found}


def figures_of(training: Mapping[str, Any]) -> dict[str, float]:
    """Accuracies of a training record, from 0 to 1."""
    metrics = training.get("metrics")
    if not isinstance(metrics, dict):
        return {}
    if (split := split_of(metrics)) is not None:
        metrics = metrics[split]
    return {
        name: float(value)
        for name, value in metrics.items()
        if (name in _ACCURACIES or name.endswith("accuracy"))
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 <= value <= 1
    }


def split_of(metrics: Any) -> str | None:
    """The split whose figures are shown, if the metrics are grouped by split."""
    if not isinstance(metrics, dict):
        return None
    return next((split for split in _SPLITS if isinstance(metrics.get(split), dict)), None)


def hub_results(training: Mapping[str, Any], datasets: tuple[str, ...]) -> Iterator[EvalResult]:
    """Figures for the Hub's own table, which needs the name of exactly one dataset."""
    rule, figures = _rule(training), figures_of(training)
    if rule is None or len(datasets) != 1:
        return
    for shot in SHOT_NAMES:
        if shot in figures:
            yield EvalResult(
                task_type="image-classification",
                dataset_type=datasets[0],
                dataset_name=datasets[0],
                metric_type="accuracy",
                metric_name=f"{shot}-shot accuracy ({line(rule)})",
                metric_value=round(figures[shot], 4),
            )


def results_section(training: Mapping[str, Any], details: Mapping[str, Any] | None) -> Iterator[str]:
    """A table of accuracies, shots first, and how they were measured."""
    figures, rule = figures_of(training), _rule(training)
    names = [name for name in SHOT_NAMES if name in figures] + sorted(figures.keys() - set(SHOT_NAMES))
    split = split_of(training["metrics"])
    header = [f"accuracy on the {split} split" if split else "accuracy on", "%"]
    rows = [[code(name), percent(figures[name])] for name in names]
    if details is not None:
        header += ["95 % interval", "calibration error in %"]
        for name, row in zip(names, rows, strict=True):
            interval, error = details["intervals"].get(name), details["calibration_error"].get(name)
            row += ["-" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"]
            row += ["-" if error is None else percent(error)]
    yield table(header, rows)
    yield f"Shot rule: {code(rule)}." if rule else "The run did not record its shot rule."
    if details is not None:
        classes = details["classes"]
        yield (
            f"{details['num_images']:,} images. Intervals: bootstrap over the images of each class. Calibration error: "
            "mean gap between probability and accuracy (ECE, 15 bins), without a temperature. "
            f"Classes with images and no correct prediction: {details['never_right']:,} of {len(classes):,}."
        )


def _broken(reason: str) -> str:
    return f"These results cannot be used: {reason}. Give the results.json of the run that wrote the prompts."


def _rule(training: Mapping[str, Any]) -> str | None:
    metrics = training.get("metrics")
    rule = training.get("rule") or (metrics.get("rule") if isinstance(metrics, dict) else None)
    return rule if isinstance(rule, str) else None
