"""Saved: a run as it is found on disk, and whether it is this one.

A run is told by everything that decides what it learns: settings, images and labels, backbone, sizes of the prompts,
number of processes. Not here: how files are written (`saves.py`).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.errors import StateError
from lpt_peft.recipe.resume.checkpoint_io import checkpoints, read_checkpoint, remove_checkpoints, write_checkpoint
from lpt_peft.recipe.settings import BYSTANDERS, TrainSettings
from lpt_peft.recipe.training.phase import PhaseRun


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds."""

    phase: str
    history: list[dict[str, Any]]
    adapter: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run in one folder; only the first process touches the disk.

    Args:
        folder: Made when the first one is saved.
        about: What tells this run from others, plain JSON; see `about_run`.
        settings: How many are kept.
        accelerator: Its processes all call every method.
    """

    def __init__(
        self, folder: Path, about: Mapping[str, Any], settings: TrainSettings, accelerator: Accelerator
    ) -> None:
        self.folder = folder
        self._about, self._settings, self._accelerator = about, settings, accelerator

    def open(self, resume: bool) -> Saved | None:
        """The last one, if there is any; or throw all away.

        Raises:
            StateError: It is damaged, or of another run; the message lists the differences.
        """
        answer: list[Any] = [None, None]
        if self._accelerator.is_main_process:
            try:
                if not resume:
                    remove_checkpoints(self.folder)
                answer[0] = self._read()
            except StateError as error:
                answer[1] = str(error)
        if self._accelerator.num_processes > 1:
            broadcast_object_list(answer)
        if answer[1] is not None:
            raise StateError(answer[1])
        saved: Saved | None = answer[0]
        return saved

    def save(self, adapter: LongTailPromptAdapter, run: PhaseRun, history: list[dict[str, Any]]) -> Path:
        """Write the run as it is after its last step; where to.

        Raises:
            StateError: The disk is full, or what was learnt is not finite any more.
        """
        tensors, numbers = run.state()
        learnt = adapter.adapter_state_dict()
        if broken := [name for name, tensor in learnt.items() if not bool(tensor.isfinite().all())]:
            raise StateError(
                f"After step {run.step} of phase {run.name}, {', '.join(broken)} hold NaN or infinity and are not "
                "saved; the checkpoint before is whole. Lower learning_rate or set clip_norm."
            )
        place = list(self._settings.plan).index(run.name) + 1
        name = f"{place}-{run.name}-{run.step:08}"
        if self._accelerator.is_main_process:
            write_checkpoint(
                self.folder,
                name,
                {**{f"adapter/{name}": tensor for name, tensor in learnt.items()}, **tensors},
                {"format_version": 1, "about": self._about, "phase": run.name, "run": numbers, "history": history},
                self._settings.keep_checkpoints,
            )
        self._accelerator.wait_for_everyone()
        return self.folder / name

    def _read(self) -> Saved | None:
        found = checkpoints(self.folder)
        if not found:
            return None
        tensors, numbers = read_checkpoint(found[-1])
        if numbers.get("format_version") != 1:
            raise StateError(f"The checkpoint {found[-1]} is of another version of this library; go on with that one.")
        if differences := _differences(numbers["about"], self._about):
            raise StateError(
                f"{found[-1]} is of another run: {'; '.join(differences)}. Start again as that run was started, or "
                "choose another folder; resume=False (--no-resume) throws its checkpoints away."
            )
        learnt = {key.removeprefix("adapter/"): t for key, t in tensors.items() if key.startswith("adapter/")}
        others = {key: tensor for key, tensor in tensors.items() if not key.startswith("adapter/")}
        return Saved(numbers["phase"], numbers["history"], learnt, others, numbers["run"])


def about_run(
    adapter: LongTailPromptAdapter,
    labels: Sequence[int],
    settings: TrainSettings,
    *,
    criterion: Any,
    validation: Any,
    processes: int,
) -> dict[str, Any]:
    """What decides the result of a run, as plain JSON."""
    told = settings.to_dict()
    shared, group = (told.pop(name) for name in ("shared", "group"))
    return {
        **{f"settings.{name}": value for name, value in told.items() if name not in BYSTANDERS},
        **{f"settings.shared.{name}": value for name, value in shared.items()},
        **{f"settings.group.{name}": value for name, value in group.items()},
        **{f"prompts.{name}": value for name, value in adapter.prompt_config.to_dict().items()},
        "prompts.head_dropout": adapter.head_drop.p,
        "images": len(labels),
        "labels_crc32": _crc32(labels),
        "validation images": 0 if validation is None else len(validation),
        "validation labels_crc32": _crc32(getattr(validation, "labels", ())),
        "criterion": None if criterion is None else getattr(criterion, "__qualname__", type(criterion).__qualname__),
        "backbone fingerprint": adapter.fingerprint,
        "processes": processes,
    }


def _crc32(labels: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(labels, dtype="<i8").tobytes())


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    names = [*here, *(name for name in saved if name not in here)]
    return [
        f"{name} is {here.get(name)!r} here and was {saved.get(name)!r}"
        for name in names
        if here.get(name) != saved.get(name)
    ]
