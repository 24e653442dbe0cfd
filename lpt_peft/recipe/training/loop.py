"""The training loop of all phases: steps, validation, checkpoints, progress bar.

Not here: a single step (`phase.py`), and the phases of a run (`recipe/train.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lpt_peft.metrics import ShotResult
from lpt_peft.metrics.result import SHOTS
from lpt_peft.recipe.loading.batches import batches, steps_per_epoch
from lpt_peft.recipe.loading.loader import open_batches
from lpt_peft.recipe.resume.interrupt import Interruption
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from lpt_peft.recipe.training.criteria import Criterion, build_criterion
from lpt_peft.recipe.training.phase import PhaseRun

History = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The loop, with everything that all phases of a run share."""

    dataset: Dataset[Any]
    labels: Sequence[int]
    settings: TrainSettings
    criterion: Criterion | None
    accelerator: Accelerator
    history: History
    progress: bool | str
    validate: Callable[[], ShotResult] | None = None
    save: Callable[[PhaseRun], Path] | None = None

    def start_phase(self, model: nn.Module, name: str, phase: PhaseSettings) -> PhaseRun:
        """Create the state of a phase before its first step."""
        head: Any = model.get_submodule("head")
        criterion = self.criterion or build_criterion(self.settings, phase.epochs, self.labels, head)
        if isinstance(criterion, nn.Module):
            criterion.to(self.accelerator.device).train()
        return PhaseRun(
            model,
            name,
            settings=self.settings,
            phase=phase,
            criterion=criterion,
            steps=steps_per_epoch(len(self.labels), self.settings),
            accelerator=self.accelerator,
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
        if self.settings.compile and self.progress and self.accelerator.is_main_process and not run.finished:
            tqdm.write(f"{run.name}: compiling the model; the first step takes about a minute", file=sys.stderr)
        if not run.finished:
            interruption = Interruption(watch=self.save is not None)
            with self._bar(run) as bar, interruption, open_batches(loader) as steps:
                for images, target in steps:
                    run.training_step(images, target, lambda: interruption.requested)
                    bar.update()
                    self._after_step(run, bar, interruption)
                    if run.finished:
                        break
        run.finalize()

    def _after_step(self, run: PhaseRun, bar: Any, interruption: Interruption) -> None:
        """Validate at the end of an epoch, save if due, and stop if requested."""
        if run.step % run.steps == 0:
            self.history.append(self._end_epoch(run))
            bar.set_postfix(_bar_values(self.history[-1]))
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

    def _bar(self, run: PhaseRun) -> Any:
        label = f"{self.progress}: {run.name}" if isinstance(self.progress, str) else run.name
        visible = bool(self.progress) and self.accelerator.is_main_process
        total = run.phase.epochs * run.steps
        return tqdm(total=total, initial=run.step, desc=label, unit="step", disable=not visible)

    def _any_process(self, condition: bool) -> bool:
        """Whether the condition holds on any process; all processes must call it."""
        flag = torch.tensor(float(condition), device=self.accelerator.device)
        total: Tensor = self.accelerator.reduce(flag, "sum")
        return bool(total > 0)


def _bar_values(record: Mapping[str, Any]) -> dict[str, str]:
    values = {"loss": f"{record['loss']:.3f}"}
    if (overall := record.get("validation", {}).get("overall")) is not None:
        values["validation"] = f"{100 * overall:.1f} %"
    return values
