"""fit: train, save and evaluate into an output folder.

    checkpoints/   to resume an interrupted run; can be removed afterwards
    prompts/       the prompt file; or, for methods without prompts,
    model/         the model file
    history.json   a record per epoch
    predictions.safetensors  predictions of the validation and test splits
    results.json   of the validation and test splits: shot metrics, and those of `class_report.py`
    left_out.json  files that were left out or cannot be read, if any

Not here: training (`train.py`), and opening data and backbone (`lpt_peft.cli`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from lpt_peft._files import write_atomic
from lpt_peft._text import number
from lpt_peft.analysis import fit_temperature
from lpt_peft.checkpoint.files import read_copy, refuse_foreign_config
from lpt_peft.data.images import LabelledImages
from lpt_peft.errors import ConfigError, InputError, StateError
from lpt_peft.metrics import ShotMetrics, ShotResult
from lpt_peft.metrics.result import SHOTS
from lpt_peft.recipe.checks import check_evaluation_split
from lpt_peft.recipe.class_report import split_results
from lpt_peft.recipe.evaluate import evaluate
from lpt_peft.recipe.left_out import left_out_files
from lpt_peft.recipe.methods import Model, method_of
from lpt_peft.recipe.parallel import gather_numbers, on_main_process
from lpt_peft.recipe.predictions import PREDICTIONS, PredictionRecorder, Predictions, write_predictions
from lpt_peft.recipe.progress import Reporter
from lpt_peft.recipe.resume.folders import check_folder, write_errors
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.recipe.summary import describe_split
from lpt_peft.recipe.train import make_accelerator, train

CHECKPOINTS, HISTORY, RESULTS = "checkpoints", "history.json", "results.json"
LEFT_OUT = "left_out.json"
_MOST_LOGITS = 10**8  # numbers: validation images times classes of which the temperature is fitted


class Splits(NamedTuple):
    """Images of a run."""

    train: LabelledImages
    validation: Dataset[Any] | None = None
    test: Dataset[Any] | None = None


def fit(
    model: Model,
    splits: Splits,
    settings: TrainSettings,
    output: Path,
    *,
    shot_rule: str = "lpt",
    about: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
    resume: bool = True,
    progress: bool | str = True,
) -> dict[str, ShotResult]:
    """Train, write the prompt file or model file, and evaluate; the test split is used once, after all choices.

    Args:
        model: A wrapped ViT, as in `train`.
        splits: Images with labels. The validation split only selects epochs; it is never trained on.
        settings: Training settings.
        output: Output folder; created if missing.
        shot_rule: A name of `lpt_peft.metrics.SHOT_RULES`.
        about: Further properties that identify this run, plain JSON, in addition to the names of classes and image
            files. A run with other values is not resumed.
        accelerator: As in `train`.
        resume: As in `train`.
        progress: As in `train`.

    Returns:
        Results by split, "validation" and "test", if given.

    Raises:
        LPTError: As `train`, and as `save_pretrained` of the model.
        KeyboardInterrupt: Ctrl-C was pressed; the run was saved, and the same call resumes it.
    """
    method = method_of(model, settings)
    accelerator = accelerator or make_accelerator(settings)
    metrics = ShotMetrics.from_rule(shot_rule, splits.train.class_counts)
    reading = splits.train.reading

    def save(figures: Mapping[str, Mapping[str, float | None]], *, trial: bool = False) -> None:
        model.save_pretrained(
            output / method.folder,
            is_main_process=not trial,  # a trial raises the same errors and writes nothing
            class_counts=splits.train.class_counts,
            label_names=splits.train.class_names,
            preprocess=reading.to_preprocess(),
            training={
                "recipe": settings.resolved().to_dict(),
                "metrics": figures,
                "rule": f"{metrics.rule}; mean over classes",
            },
        )

    def check() -> None:
        check_folder(output)
        folder = output / method.folder
        refuse_foreign_config(folder, read_copy(folder), method.format)
        save(dict.fromkeys(("validation", "test"), dict.fromkeys(SHOTS, 1 / 3)), trial=True)

    on_main_process(accelerator, check)
    for name, split in (("validation", splits.validation), ("test", splits.test)):
        if getattr(split, "reading", reading) != reading:
            raise ConfigError(
                f"The training split is read with {reading}, the {name} split with {getattr(split, 'reading', None)}: "
                "give all transforms the same exif and background."
            )
    if splits.test is not None:
        check_evaluation_split(model.to(accelerator.device), splits.test, "test", accelerator)
    reporter = Reporter(progress, accelerator.is_main_process)
    if splits.test is not None:
        reporter.note(f"Test: {describe_split(splits.test, model.num_classes)}")
    with reporter.unreadable_images(**splits._asdict()):
        history = train(
            model,
            splits.train,
            splits.train.labels,
            settings,
            validation=splits.validation,
            accelerator=accelerator,
            checkpoints=output / CHECKPOINTS,
            about={
                **splits.train.about(),
                **{f"images.{name}": value for name, value in reading.to_preprocess().items()},
                **(about or {}),
            },
            shot_rule=shot_rule,
            resume=resume,
            progress=progress,
        )
        model.metadata = replace(model.metadata, temperature=None)  # of earlier weights
        results, predictions = _measure(
            model, splits, metrics, num_workers=settings.num_workers, accelerator=accelerator, reporter=reporter
        )
        for split in splits:
            if isinstance(split, LabelledImages):
                split.unreadable_images.add(gather_numbers(accelerator, split.unreadable_images.positions()))

    def write() -> None:
        figures = {name: {shot: getattr(result, shot) for shot in SHOTS} for name, result in results.items()}
        with write_errors(output, "Training is complete and saved: fix the cause and run the same command again."):
            save(figures)
            write_predictions(output / PREDICTIONS, predictions)
        write_json(output / HISTORY, history)
        about_classes = (splits.train.class_names, splits.train.class_counts, metrics.rule)
        entries = {name: split_results(results[name], found, *about_classes) for name, found in predictions.items()}
        write_json(output / RESULTS, entries)
        if left_out := left_out_files(splits._asdict()):
            write_json(output / LEFT_OUT, left_out)
            reporter.note(f"Files that were left out or cannot be read: {output / LEFT_OUT}")
        else:
            (output / LEFT_OUT).unlink(missing_ok=True)

    on_main_process(accelerator, write)
    return results


def _measure(
    model: Model,
    splits: Splits,
    metrics: ShotMetrics,
    *,
    num_workers: int | None,
    accelerator: Accelerator,
    reporter: Reporter,
) -> tuple[dict[str, ShotResult], dict[str, Predictions]]:
    """Evaluate the validation split, which also gives the temperature, and the test split."""
    results: dict[str, ShotResult] = {}
    predictions: dict[str, Predictions] = {}
    for name, split in (("validation", splits.validation), ("test", splits.test)):
        if split is None:
            continue
        most = max(1, _MOST_LOGITS // model.num_classes)
        every = max(1, -(-len(split) // most)) if name == "validation" else None  # type: ignore[arg-type]
        recorder = PredictionRecorder(logits_every=every)
        results[name] = evaluate(
            model,
            split,
            metrics,
            num_workers=num_workers,
            distributed=True,
            accelerator=accelerator,
            recorder=recorder,
        )
        assert recorder.result is not None  # noqa: S101 - narrows the type
        predictions[name] = recorder.result
        if recorder.logits is not None:
            _calibrate(model, *recorder.logits, reporter)
    return results, predictions


def _calibrate(model: Model, logits: Tensor, target: Tensor, reporter: Reporter) -> None:
    """Fit the temperature of a model on validation images; its file stores it, and predictions use it."""
    try:
        value = fit_temperature(logits, target).value
    except InputError as error:
        reporter.note(f"note: the probabilities are not calibrated. {error}")
        value = None
    else:
        reporter.note(
            f"Temperature of the probabilities, fitted on {number(len(target), 'validation image')}: {value:.3g}"
        )
    model.metadata = replace(model.metadata, temperature=value)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically.

    Raises:
        StateError: The folder is not writable, or the disk is full.
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        write_atomic(path, text.encode("utf-8"))
    except OSError as error:
        raise StateError(
            f"{path} cannot be written: {error.strerror or error}. Choose a writable folder, or free disk space; the "
            "earlier content is intact."
        ) from error
