"""Whole runs on Accelerate: phase after phase of LPT, or one phase of any model; from the start or from a checkpoint.

One process or many, CPU or GPU. Random numbers follow from seed, phase and step (`randomness.py`), and the caller's are
given back. Not here: the loop (`loop.py`), data sets, and what to do with the prompts afterwards (`fit.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.errors import ConfigError
from lpt_peft.metrics import ShotMetrics, ShotResult
from lpt_peft.recipe.checks import check_data, check_image
from lpt_peft.recipe.evaluate import Evaluation
from lpt_peft.recipe.parallel import check_accelerator, check_precision, copy_from_first
from lpt_peft.recipe.randomness import kept_random_state
from lpt_peft.recipe.resume.checkpointing import Checkpoints, about_run
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from lpt_peft.recipe.training.criteria import Criterion
from lpt_peft.recipe.training.loop import History, Loop
from lpt_peft.recipe.training.phase import PhaseRun
from lpt_peft.recipe.training.phase_init import begin_phase


def train(
    adapter: LongTailPromptAdapter,
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
    """Train the phases that the settings plan; the adapter is left in the last one, in eval mode.

    With several processes every one calls this with the same arguments; `batch_size` images are shared out among them,
    so their number changes nothing but speed and rounding.

    Args:
        adapter: A wrapped ViT.
        dataset: Map-style, yields (image, label), `len(labels)` items.
        labels: Class of every item, 0 to `C - 1`; every class at least once.
        settings: How to train; None takes the defaults: the paper's recipe, but keys start at k-means centres and
            groups as copies of the shared prompt.
        validation: Yields (image, label); for history, `keep="best"` and `patience`. Never the test part.
        criterion: Called as `criterion(output, target, epoch)` with epochs counted from 0 in every phase; None takes
            what `settings.loss` says.
        accelerator: Yours, for trackers for example; None makes one of `settings.mixed_precision`.
        checkpoints: Folder to save the run in as it goes, some megabytes at a time; None saves nothing. Ctrl-C and
            SIGTERM then save first.
        about: More that tells this run from others, plain JSON, such as how images are cropped: what is different
            there from the checkpoint's is refused, as settings, labels, backbone and number of processes are.
        shot_rule: A name of `lpt_peft.metrics.SHOT_RULES`, for the validation's many, medium and few.
        resume: Go on from the last checkpoint there, to the very prompts that a run without a break gives (on a CPU,
            and with the same number of processes). False throws the checkpoints away.
        progress: Show a bar for each phase; a text is put before the phase's name.

    Returns:
        One record for each epoch: phase, epoch, loss, learning_rate of its last step, and shot accuracies of a
        validation.

    Raises:
        InputError: Labels do not fit the dataset or the head, or a class has no image.
        ConfigError: The settings need a validation part that is not there, or the batch cannot be shared out.
        StateError: The loss became NaN or infinite, a checkpoint is of another run or cannot be written.
        KeyboardInterrupt: Ctrl-C was pressed; with `checkpoints`, after saving.
    """
    settings = settings or TrainSettings()
    accelerator = accelerator or make_accelerator(settings)
    if validation is None and (settings.keep == "best" or settings.patience is not None):
        raise ConfigError(
            f"keep={settings.keep!r} and patience={settings.patience} choose by validation images: pass validation=, "
            "images that are neither trained on nor tested on."
        )
    labels = _prepare(adapter, dataset, labels, settings, criterion=criterion, accelerator=accelerator)
    store, saved = None, None
    if checkpoints is not None:
        told = about_run(
            adapter, labels, settings, criterion=criterion, validation=validation, processes=accelerator.num_processes
        )
        store = Checkpoints(checkpoints, {**told, **(about or {})}, settings, accelerator)
        saved = store.open(resume)
    history: History = list(saved.history) if saved else []
    names = list(settings.plan)
    counts = torch.bincount(torch.as_tensor(labels), minlength=adapter.prompt_config.num_classes)

    evaluation = None
    if validation is not None:
        workers = settings.num_workers
        evaluation = Evaluation(
            adapter, validation, num_workers=workers, distributed=True, accelerator=accelerator, persistent=True
        )

    def validate() -> ShotResult:
        assert evaluation is not None  # noqa: S101 - narrows the type
        return evaluation(ShotMetrics.from_rule(shot_rule, counts))

    def save(run: PhaseRun) -> Path:
        assert store is not None  # noqa: S101 - narrows the type
        return store.save(adapter, run, history)

    loop = Loop(
        dataset=dataset,
        labels=labels,
        settings=settings,
        criterion=criterion,
        accelerator=accelerator,
        history=history,
        progress=progress,
        validate=None if validation is None else validate,
        save=None if store is None else save,
    )
    with kept_random_state():
        for name in names[names.index(saved.phase) if saved else 0 :]:
            learnt = saved.adapter if saved else None
            begin_phase(adapter, name, dataset, settings, accelerator=accelerator, saved=learnt)
            run = loop.start_phase(adapter, name, settings.plan[name])
            if saved:
                run.restore(saved.tensors, saved.numbers)
                saved = None
            loop.run(run)
    if names:
        adapter.phase = "shared" if names[-1] == "shared" else "group"  # "joint" had opened the shared prompt
    adapter.eval()
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
    """Train what requires a gradient in `model`: one phase of LPT, or a baseline by the same loop.

    Args:
        model: Called as `model(images, return_output=True)`; returns an `AdapterOutput`. Has a `CosineClassifier`
            named `head`.
        dataset: Map-style, yields (image, label).
        labels: Class of every item.
        settings: What phases share; what is said there of validation and checkpoints has no use here.
        phase: What is this phase's own.
        name: For history, seeds and progress bar.
        criterion: Called as `criterion(output, target, epoch)`; None takes what `settings.loss` says.
        accelerator: Yours, or None for one of `settings.mixed_precision`.
        progress: Show a bar; a text is put before the name.

    Returns:
        One record for each epoch.
    """
    accelerator = accelerator or make_accelerator(settings)
    labels = _prepare(model, dataset, labels, settings, criterion=criterion, accelerator=accelerator)
    loop = Loop(
        dataset=dataset,
        labels=labels,
        settings=settings,
        criterion=criterion,
        accelerator=accelerator,
        history=[],
        progress=progress,
    )
    with kept_random_state():
        loop.run(loop.start_phase(model, name, phase))
    model.eval()
    return loop.history


def make_accelerator(settings: TrainSettings, **options: Any) -> Accelerator:
    """An Accelerator of the settings' precision; `options` are its own."""
    cpu = not torch.accelerator.is_available()  # else Accelerate would take several processes without a GPU for one
    return Accelerator(mixed_precision=settings.mixed_precision, cpu=cpu, **options)


def _prepare(
    model: nn.Module,
    dataset: Dataset[Any],
    labels: Sequence[int],
    settings: TrainSettings,
    *,
    criterion: Criterion | None,
    accelerator: Accelerator,
) -> list[int]:
    """Put the model in place, the same on every process, when all is checked that can be; the labels as numbers."""
    check_accelerator(accelerator)
    check_precision(settings, accelerator)
    head: Any = model.get_submodule("head")
    plain = check_data(
        dataset,
        labels,
        settings,
        num_classes=len(head.weight),
        num_processes=accelerator.num_processes,
        own_criterion=criterion is not None,
    )
    if settings.backbone_dtype != "float32":
        if not isinstance(model, LongTailPromptAdapter):
            raise ConfigError(
                f"backbone_dtype={settings.backbone_dtype!r} casts the frozen ViT of an adapter, and a "
                f'{type(model).__name__} has none: leave it at "float32", and cast the model yourself.'
            )
        model.cast_backbone(getattr(torch, settings.backbone_dtype))
    model.to(accelerator.device)
    copy_from_first(model)
    check_image(model, dataset, plain, accelerator)
    return plain
