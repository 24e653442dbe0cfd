"""Complete runs on Accelerate: all phases of a method, or a single phase of any model.

Runs on a CPU, a GPU or several processes, from the start or from a checkpoint. Random numbers depend on seed, phase and
step, and the caller's generators are restored. Not here: the loop (`training/loop.py`), and output folders
(`experiment.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from lpt_peft._random import preserve_random_state
from lpt_peft._text import number
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.errors import ConfigError
from lpt_peft.metrics import ShotMetrics, ShotResult
from lpt_peft.recipe.checks import check_evaluation_split, prepare
from lpt_peft.recipe.evaluate import Evaluation
from lpt_peft.recipe.methods import Model, method_of
from lpt_peft.recipe.progress import Reporter
from lpt_peft.recipe.rates import with_rates
from lpt_peft.recipe.resume.checkpointing import Checkpoints, run_identity
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from lpt_peft.recipe.summary import run_summary
from lpt_peft.recipe.training.criteria import Criterion
from lpt_peft.recipe.training.loop import History, Loop
from lpt_peft.recipe.training.phase import PhaseRun


def train(
    model: Model,
    dataset: Dataset[Any],
    labels: Sequence[int],
    settings: TrainSettings | None = None,
    *,
    validation: Dataset[Any] | None = None,
    criterion: Criterion | None = None,
    accelerator: Accelerator | None = None,
    checkpoints: Path | None = None,
    about: Mapping[str, Any] | None = None,
    shot_rule: str = "lpt",
    resume: bool = True,
    progress: bool | str = True,
) -> History:
    """Train the phases of the settings; leave the model in eval mode, and an adapter in its last phase.

    With several processes, all call this with the same arguments. The images of a step are shared among them, so their
    number affects only speed and rounding.

    Args:
        model: A wrapped ViT: an adapter for `method` "lpt", "vpt_deep" and "vpt_shallow", or a `ViTClassifier`.
        dataset: Map-style, yields (image, label), `len(labels)` items.
        labels: Class of every item, 0 to `C - 1`; every class at least once.
        settings: Training settings; None uses the defaults, which won on validation images of Emoji-LT: shared prompt
            and groups trained together by AdamW, from tokens of training images. `preset("paper")` has the paper's.
        validation: Yields (image, label); for history, `keep="best"` and `patience`. Never the test split.
        criterion: Called as `criterion(output, target, epoch)` with epochs counted from 0 in every phase; None uses
            `settings.loss`.
        accelerator: An existing accelerator, for example with trackers; None creates one from
            `settings.mixed_precision`.
        checkpoints: Folder for checkpoints; None saves nothing. Each takes a few megabytes, with `method="full"` two to
            four times the weights of the ViT (weights, momentum, average, best epoch). Ctrl-C and SIGTERM save before
            the run stops.
        about: Further properties that identify this run, plain JSON, such as the cropping of images. A run is resumed
            only if they, the settings, labels, backbone and number of processes equal the checkpoint's.
        shot_rule: A name of `lpt_peft.metrics.SHOT_RULES`, for many, medium and few of the validation.
        resume: Resume from the last checkpoint in the folder; the result is identical to an uninterrupted run (on a
            CPU, and with the same number of processes). False removes existing checkpoints.
        progress: Print a summary, progress and notes on stderr: a bar on a terminal, otherwise a line per epoch and
            every five minutes. A string precedes the name of the phase. False prints nothing; warnings are then
            `UserWarning` each.

    Returns:
        A record per epoch: phase, epoch, loss, learning_rate of its last step, and shot accuracies if validated.

    Raises:
        InputError: Labels do not fit the dataset or the head, or a class has no image.
        ConfigError: The settings need a validation split, the batch cannot be divided evenly, or the model does not fit
            the method.
        StateError: The loss became NaN or infinite, or a checkpoint belongs to a different run or cannot be written.
        KeyboardInterrupt: Ctrl-C was pressed; with `checkpoints`, after saving.
    """
    settings = settings or TrainSettings()
    method = method_of(model, settings)
    accelerator = accelerator or make_accelerator(settings)
    if validation is None and (settings.keep == "best" or settings.patience is not None):
        raise ConfigError(
            f"keep={settings.keep!r} and patience={settings.patience} need validation images: pass validation=, with "
            "images that are neither trained on nor tested on."
        )
    labels = prepare(model, dataset, labels, settings, criterion=criterion, accelerator=accelerator)
    if validation is not None:
        check_evaluation_split(model, validation, "validation", accelerator)
    store, saved = None, None
    if checkpoints is not None:
        processes = accelerator.num_processes
        identity = run_identity(
            method.identity(), labels, settings, criterion=criterion, validation=validation, processes=processes
        )
        store = Checkpoints(checkpoints, {**identity, **(about or {})}, settings, accelerator)
        saved = store.load(resume)
    reporter = Reporter(progress, accelerator.is_main_process)
    reporter.note(
        run_summary(
            dataset,
            labels,
            settings,
            accelerator,
            num_classes=model.num_classes,
            query=model.prompt_config.query if isinstance(model, LongTailPromptAdapter) else "final",
            trained_parts=getattr(model, "trained_parts", None),
            validation=validation,
            criterion=criterion,
        )
    )
    if saved:
        reporter.note(f"Resuming phase {saved.phase} after step {saved.numbers['step']}, saved in {saved.path}")
    elif store is not None and store.removed:
        reporter.note(f"Removed {number(store.removed, 'checkpoint')} of an earlier run in {store.folder}")
    history: History = list(saved.history) if saved else []
    names = list(settings.plan)
    counts = torch.bincount(torch.as_tensor(labels), minlength=model.num_classes)

    evaluation = None
    if validation is not None:
        workers = settings.num_workers
        evaluation = Evaluation(
            model, validation, num_workers=workers, distributed=True, accelerator=accelerator, persistent=True
        )

    def validate() -> ShotResult:
        assert evaluation is not None  # noqa: S101 - narrows the type
        return evaluation(ShotMetrics.from_rule(shot_rule, counts))

    def save(run: PhaseRun) -> Path:
        assert store is not None  # noqa: S101 - narrows the type
        return store.save(method.state(), run, history)

    loop = Loop(
        dataset=dataset,
        labels=labels,
        settings=settings,
        criterion=criterion,
        accelerator=accelerator,
        history=history,
        reporter=reporter,
        validate=None if validation is None else validate,
        save=None if store is None else save,
    )
    try:
        with reporter.unreadable_images(train=dataset, validation=validation), preserve_random_state():
            for name in names[names.index(saved.phase) if saved else 0 :]:
                trained = saved.trained if saved else None
                method.begin(name, dataset, settings, accelerator=accelerator, reporter=reporter, saved=trained)
                run = loop.start_phase(model, name, settings.plan[name])
                if saved:
                    run.restore(saved.tensors, saved.numbers)
                    saved = None
                loop.run(run)
    finally:
        if evaluation is not None:
            evaluation.close()
    method.end(names)
    model.eval()
    return history


def run_phase(
    model: nn.Module,
    dataset: Dataset[Any],
    labels: Sequence[int],
    settings: TrainSettings,
    phase: PhaseSettings,
    *,
    name: str = "training",
    criterion: Criterion | None = None,
    accelerator: Accelerator | None = None,
    progress: bool | str = True,
) -> History:
    """Train the parameters of `model` that require a gradient: a phase of LPT, or a baseline with the same loop.

    Args:
        model: Called as `model(images, return_output=True)`; returns an `AdapterOutput`. Has a `CosineClassifier`
            named `head`.
        dataset: Map-style, yields (image, label).
        labels: Class of every item.
        settings: Settings of all phases; those on validation and checkpoints are not used.
        phase: Settings of this phase.
        name: For history, seeds and progress bar.
        criterion: Called as `criterion(output, target, epoch)`; None uses `settings.loss`.
        accelerator: An existing accelerator; None creates one from `settings.mixed_precision`.
        progress: As in `train`, without the summary.

    Returns:
        A record per epoch.

    Raises:
        LPTError: As `train`.
    """
    accelerator = accelerator or make_accelerator(settings)
    if settings.keep == "best" or settings.patience is not None:
        raise ConfigError(
            f"keep={settings.keep!r} and patience={settings.patience} need validation, which run_phase does not do: "
            "use train, or leave them out."
        )
    reporter = Reporter(progress, accelerator.is_main_process)
    labels = prepare(model, dataset, labels, settings, criterion=criterion, accelerator=accelerator)
    loop = Loop(
        dataset=dataset,
        labels=labels,
        settings=settings,
        criterion=criterion,
        accelerator=accelerator,
        history=[],
        reporter=reporter,
    )
    with reporter.unreadable_images(train=dataset), preserve_random_state():
        loop.run(loop.start_phase(model, name, with_rates(phase, settings)))
    model.eval()
    return loop.history


def make_accelerator(settings: TrainSettings, **options: Any) -> Accelerator:
    """Create an Accelerator with the precision of the settings.

    Args:
        settings: `mixed_precision` is used.
        **options: Further arguments of `Accelerator`.

    Raises:
        ConfigError: Accelerate refuses the precision, or was set up differently before.
    """
    cpu = not torch.accelerator.is_available()  # otherwise Accelerate ignores additional processes without a GPU
    try:
        return Accelerator(mixed_precision=settings.mixed_precision, cpu=cpu, **options)
    except ValueError as error:
        raise ConfigError(
            f'Accelerate cannot be set up with mixed_precision="{settings.mixed_precision}": {error} Its configuration '
            "is fixed by the first Accelerator of a process."
        ) from error
