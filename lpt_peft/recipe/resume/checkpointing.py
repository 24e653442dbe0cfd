"""Saves and restores runs, and refuses to resume a different run.

A run is identified by everything that determines its result: settings, images and labels, backbone, sizes of prompts
and head, number of processes. Not here: how files are written (`checkpoint_io.py`).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from lpt_peft.errors import StateError
from lpt_peft.recipe.parallel import on_main_process
from lpt_peft.recipe.resume.checkpoint_io import checkpoints, read_checkpoint, remove_checkpoints, write_checkpoint
from lpt_peft.recipe.resume.folders import check_folder
from lpt_peft.recipe.settings import RESUME_IGNORED_FIELDS, TrainSettings
from lpt_peft.recipe.training.phase import PhaseRun


@dataclass(frozen=True)
class SavedRun:
    """Content of a checkpoint."""

    path: Path
    phase: str
    history: list[dict[str, Any]]
    trained: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of a run in a folder; only the first process accesses the disk.

    Args:
        folder: Created by `load` if missing.
        identity: What distinguishes this run from others, plain JSON; see `run_identity`.
        settings: Number of checkpoints to keep.
        accelerator: Its processes must all call every method.

    Attributes:
        removed: Number of checkpoints removed by `load(resume=False)`, on the main process.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], settings: TrainSettings, accelerator: Accelerator
    ) -> None:
        self.folder, self.removed = folder, 0
        self._identity, self._settings, self._accelerator = identity, settings, accelerator

    def load(self, resume: bool) -> SavedRun | None:
        """Check that the folder is writable, then read the last checkpoint, if any.

        Args:
            resume: False removes all checkpoints.

        Raises:
            StateError: The folder is not writable, the checkpoint is damaged, or it belongs to a different run; the
                message lists the differences.
        """

        def read() -> SavedRun | None:
            check_folder(self.folder)
            if not resume:
                self.removed = remove_checkpoints(self.folder)
            return self._read()

        return on_main_process(self._accelerator, read)

    def save(self, trained: Mapping[str, Tensor], run: PhaseRun, history: list[dict[str, Any]]) -> Path:
        """Write the state after the last step; return the checkpoint's path.

        Args:
            trained: All tensors that the run trains, from `Method.state`.
            run: The current phase.
            history: Records of the completed epochs.

        Raises:
            StateError: The disk is full, or trained parameters are no longer finite.
        """
        tensors, numbers = run.state()
        if broken := [name for name, tensor in trained.items() if not bool(tensor.isfinite().all())]:
            raise StateError(
                f"After step {run.step} of phase {run.name}, {', '.join(broken)} contain NaN or infinity and are not "
                "saved; the previous checkpoint is intact. Lower learning_rate or set clip_norm."
            )
        number = list(self._settings.plan).index(run.name) + 1
        name = f"{number}-{run.name}-{run.step:08}"
        content = {"format_version": 1, "about": self._identity, "phase": run.name, "run": numbers, "history": history}
        tensors |= {f"trained/{key}": tensor for key, tensor in trained.items()}
        keep = self._settings.keep_checkpoints
        on_main_process(self._accelerator, lambda: write_checkpoint(self.folder, name, tensors, content, keep))
        return self.folder / name

    def _read(self) -> SavedRun | None:
        found = checkpoints(self.folder)
        if not found:
            return None
        tensors, numbers = read_checkpoint(found[-1])
        if numbers.get("format_version") != 1:
            raise StateError(f"The checkpoint {found[-1]} was written by another version of lpt_peft; resume with it.")
        if differences := _differences(numbers["about"], self._identity):
            raise StateError(
                f"{found[-1]} belongs to a different run: {'; '.join(differences)}. Use the settings of that run, or "
                "choose another folder; resume=False (--no-resume) removes its checkpoints."
            )
        trained = {key.removeprefix("trained/"): t for key, t in tensors.items() if key.startswith("trained/")}
        remaining = {key: tensor for key, tensor in tensors.items() if not key.startswith("trained/")}
        return SavedRun(found[-1], numbers["phase"], numbers["history"], trained, remaining, numbers["run"])


def run_identity(
    model: Mapping[str, Any],
    labels: Sequence[int],
    settings: TrainSettings,
    *,
    criterion: Any,
    validation: Any,
    processes: int,
) -> dict[str, Any]:
    """What determines the result of a run, as plain JSON.

    Args:
        model: From `Method.identity`.
        labels: Class of every training image.
        settings: Training settings.
        criterion: The caller's criterion, if any.
        validation: Validation images, if any.
        processes: Number of processes.
    """
    values = settings.resolved().to_dict()
    shared, group = (values.pop(name) for name in ("shared", "group"))
    return {
        **{f"settings.{name}": value for name, value in values.items() if name not in RESUME_IGNORED_FIELDS},
        **{f"settings.shared.{name}": value for name, value in shared.items()},
        **{f"settings.group.{name}": value for name, value in group.items()},
        **model,
        "images": len(labels),
        "labels_crc32": _crc32(labels),
        "validation images": 0 if validation is None else len(validation),
        "validation labels_crc32": _crc32(getattr(validation, "labels", ())),
        "criterion": None if criterion is None else getattr(criterion, "__qualname__", type(criterion).__qualname__),
        "processes": processes,
    }


def _crc32(labels: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(labels, dtype="<i8").tobytes())


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    names = [*current, *(name for name in saved if name not in current)]
    return [
        f"{name} is {current.get(name)!r} now and was {saved.get(name)!r}"
        for name in names
        if current.get(name) != saved.get(name)
    ]
