"""The one loop of every phase: step after step, and what happens between them: validation, checkpoints, a bar.

Not here: a single step (`phase.py`), and which phases a run has (`runs.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lpt_peft.metrics import ShotResult
from lpt_peft.metrics.result import SHOTS
from lpt_peft.recipe.loading.batches import batches, steps_per_epoch
from lpt_peft.recipe.parallel import summed
from lpt_peft.recipe.resume.interrupt import Interruption
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
from lpt_peft.recipe.training.criteria import Criterion, criterion_of
from lpt_peft.recipe.training.phase import PhaseRun

History = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What all phases of a run share, and what happens between their steps."""

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
        """A phase before its first step."""
        head: Any = model.get_submodule("head")
        criterion = self.criterion or criterion_of(self.settings, phase.epochs, self.labels, head)
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
        """From where the run is to the end of its phase."""
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
        with self._bar(run) as bar, Interruption(watch=self.save is not None) as interruption:
            for images, target in () if run.finished else loader:
                run.advance(images, target, lambda: interruption.asked)
                bar.update()
                if run.step % run.steps == 0:
                    self.history.append(self._end_epoch(run))
                    bar.set_postfix(_shown(self.history[-1]))
                if self.save is not None:
                    due = run.step % (self.settings.save_every or run.steps) == 0
                    path = self.save(run) if due or run.finished or run.stopped else None
                    if run.stopped or (
                        run.finished and _any(interruption.asked, self.accelerator.device)
                    ):  # during the last validation
                        raise KeyboardInterrupt(f"stopped after step {run.step} of phase {run.name}, saved as {path}")
                if run.finished:
                    break
        run.finish()

    def _end_epoch(self, run: PhaseRun) -> dict[str, Any]:
        """The record of the epoch, which trackers are told as well."""
        record = run.end_epoch()
        due = run.epoch % self.settings.validate_every == 0 or run.epoch == run.phase.epochs
        if self.validate is not None and due:
            with run.result():
                result = self.validate()
            run.judge(result.balanced_accuracy or 0.0)
            record["validation"] = {name: getattr(result, name) for name in SHOTS}
        told = {"loss": record["loss"], "learning_rate": record["learning_rate"]}
        told |= {name: value for name, value in record.get("validation", {}).items() if value is not None}
        values = {f"{run.name}/{name}": value for name, value in told.items()}
        self.accelerator.log(values, step=len(self.history) + 1)
        return record

    def _bar(self, run: PhaseRun) -> Any:
        label = f"{self.progress}: {run.name}" if isinstance(self.progress, str) else run.name
        shown = bool(self.progress) and self.accelerator.is_main_process
        total = run.phase.epochs * run.steps
        return tqdm(total=total, initial=run.step, desc=label, unit="step", disable=not shown)


def _any(answer: bool, device: torch.device) -> bool:
    """Whether any process says so; all must ask."""
    return bool(summed(torch.tensor(float(answer), device=device)) > 0)


def _shown(record: Mapping[str, Any]) -> dict[str, str]:
    """What the bar tells of an epoch."""
    told = {"loss": f"{record['loss']:.3f}"}
    if (overall := record.get("validation", {}).get("overall")) is not None:
        told["validation"] = f"{100 * overall:.1f} %"
    return told
