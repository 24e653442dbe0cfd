"""The training loop of all phases: steps, validation, checkpoints, progress.

Not here: a single step (`phase.py`), and the phases of a run (`recipe/train.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from lpt_peft.data.workers import open_batches
from lpt_peft.metrics import ShotResult
from lpt_peft.metrics.result import SHOTS
from lpt_peft.prompts import PromptPool
from lpt_peft.recipe.loading.batches import batches, steps_per_epoch
from lpt_peft.recipe.progress import Progress, Reporter
from lpt_peft.recipe.resume.interrupt import Interruption
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from lpt_peft.recipe.training.criteria import Criterion, add_query_regularizer, build_criterion
from lpt_peft.recipe.training.phase import PhaseRun
from lpt_peft.recipe.training.rare_predictions import RarePredictionMonitor

History = list[dict[str, Any]]
_MAX_GROUPS = 10  # in a message


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The loop, with everything that all phases of a run share."""

    dataset: Dataset[Any]
    labels: Sequence[int]
    settings: TrainSettings
    criterion: Criterion | None
    accelerator: Accelerator
    history: History
    reporter: Reporter
    validate: Callable[[], ShotResult] | None = None
    save: Callable[[PhaseRun], Path] | None = None

    def start_phase(
        self, model: nn.Module, name: str, phase: PhaseSettings, *, steps: int | None = None, **options: Any
    ) -> PhaseRun:
        """Create the state of a phase before its first step.

        Args:
            model: Its parameters that require a gradient are trained.
            name: Of the phase.
            phase: Settings of the phase.
            steps: Steps of an epoch; None: those that cover the training images.
            **options: `schedule` and `check_every` of `PhaseRun`.
        """
        head: Any = model.get_submodule("head")
        criterion = self.criterion or build_criterion(self.settings, phase.epochs, self.labels, head)
        if isinstance(criterion, nn.Module):
            criterion.to(self.accelerator.device).train()
        criterion = add_query_regularizer(criterion, self.settings, model)
        return PhaseRun(
            model,
            name,
            settings=self.settings,
            phase=phase,
            criterion=criterion,
            steps=steps or steps_per_epoch(len(self.labels), self.settings),
            accelerator=self.accelerator,
            monitor=RarePredictionMonitor(self.labels, len(head.weight), self.accelerator.device),
            **options,
        )

    def run(self, run: PhaseRun) -> None:
        """Train from the current step to the end of the phase."""
        loader = batches(
            self.dataset,
            self.labels,
            self.settings,
            run.name,
            epochs=run.phase.epochs,
            start=run.step,
            num_replicas=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        run.model.train()
        if not run.finished:
            if self.settings.compile:
                self.reporter.note(f"{run.name}: compiling the model; the first step takes about a minute")
            interruption = Interruption(watch=self.save is not None)
            with self._progress(run) as progress, interruption, open_batches(loader) as steps:
                for images, target in steps:
                    run.training_step(images, target, lambda: interruption.requested)
                    progress.step(run.step, run.current)
                    self._after_step(run, progress, interruption)
                    if run.finished:
                        break
        if run.epoch < run.phase.epochs:
            self.reporter.note(
                f"{run.name}: ended after {run.epoch} of {run.phase.epochs} epochs, since {run.stale} validations did "
                "not improve"
            )
        if self.settings.keep == "best" and run.best["epoch"] is not None:
            best = f"epoch {run.best['epoch'] + 1}, balanced accuracy {100 * run.best['score']:.1f} %"
            self.reporter.note(f"{run.name}: the result is that of the best validation ({best})")
        run.finalize()
        self._report_dead_groups(run)

    def _after_step(self, run: PhaseRun, progress: Progress, interruption: Interruption) -> None:
        """Validate at the end of an epoch, save if due, and stop if requested."""
        if run.step % run.steps == 0:
            self.history.append(self._end_epoch(run))
            progress.epoch(run.step, self.history[-1])
        if self.save is None:
            return
        due = run.step % (self.settings.save_every or run.steps) == 0
        path = self.save(run) if due or run.finished or run.stopped else None
        # A signal during the last validation has not reached `run.stopped`.
        if run.stopped or (run.finished and self._any_process(interruption.requested)):
            raise KeyboardInterrupt(f"stopped after step {run.step} of phase {run.name}, saved as {path}")

    def _end_epoch(self, run: PhaseRun) -> dict[str, Any]:
        """Validate if due; return the epoch's record and log it to trackers."""
        record = run.end_epoch()
        self._check_predictions(run)
        previous = self.history[-1].get("loss_scale") if self.history else None
        if previous is not None and record["loss_scale"] < previous:
            self.reporter.note(
                f"{run.name}: the loss scale fell from {previous:g} to {record['loss_scale']:g}, since gradients "
                "overflowed in float16; those steps were skipped"
            )
        due = run.epoch % self.settings.validate_every == 0 or run.epoch == run.phase.epochs
        if self.validate is not None and due:
            with run.averaged_parameters():
                result = self.validate()
            run.record_validation(result.balanced_accuracy or 0.0)
            record["validation"] = {name: getattr(result, name) for name in SHOTS}
        values = {"loss": record["loss"], "learning_rate": record["learning_rate"]}
        values |= {name: value for name, value in record.get("validation", {}).items() if value is not None}
        self.accelerator.log({f"{run.name}/{name}": value for name, value in values.items()}, len(self.history) + 1)
        return record

    def _check_predictions(self, run: PhaseRun) -> None:
        """Warn once per phase if predictions only name rare classes; the first of several epochs is too early."""
        found = None if run.monitor is None else run.monitor.check()
        if found is None or (run.epoch == 1 and run.phase.epochs > 1):
            return
        predicted, labelled, number = found
        self.reporter.warn(
            f"In epoch {run.epoch} of phase {run.name}, {100 * predicted:.1f} % of the predictions on training images "
            f"name the {number} most frequent classes, which {100 * labelled:.1f} % of these images belong to: the "
            f"model only predicts rare classes. Lower {run.rate}."
        )
        run.monitor = None

    def _report_dead_groups(self, run: PhaseRun) -> None:
        pool = getattr(run.model, "pool", None)
        if not (isinstance(pool, PromptPool) and pool.usage.any()):
            return
        if dead := pool.dead_groups():
            groups = ", ".join(map(str, dead[:_MAX_GROUPS])) + (", ..." if len(dead) > _MAX_GROUPS else "")
            self.reporter.note(f"{run.name}: {len(dead)} of {len(pool.keys)} groups were never selected: {groups}")

    def _progress(self, run: PhaseRun) -> Progress:
        names = list(self.settings.plan)
        later = names[names.index(run.name) + 1 :] if run.name in names else []
        return self.reporter.phase(
            run.name,
            steps=run.phase.epochs * run.steps,
            steps_per_epoch=run.steps,
            start=run.step,
            images=self.settings.batch_size,
            later=sum(self.settings.plan[name].epochs for name in later) * run.steps,
        )

    def _any_process(self, condition: bool) -> bool:
        """Whether the condition holds on any process; all processes must call it."""
        flag = torch.tensor(float(condition), device=self.accelerator.device)
        total: Tensor = self.accelerator.reduce(flag, "sum")
        return bool(total > 0)
