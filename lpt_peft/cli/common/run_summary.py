"""The summary at the start of a run: its data, and where and how long it trains."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import Accelerator

from lpt_peft.cli.common.messages import notice
from lpt_peft.data.images import LabelledImages
from lpt_peft.recipe.loading.batches import steps_per_epoch
from lpt_peft.recipe.settings import TrainSettings


def print_summary(
    splits: Mapping[str, LabelledImages], accelerator: Accelerator, training: TrainSettings | None = None
) -> None:
    """Print on standard error what each split contains and what was left out, the device, and the steps to train."""
    for name, split in splits.items():
        for line in str(split.summary).splitlines():
            notice(f"{name}: {line}")
    processes = accelerator.num_processes
    lines = [f"device {accelerator.device.type}" + (f", {processes} processes" if processes > 1 else "")]
    if training is not None:
        steps = steps_per_epoch(len(splits["train"]), training)
        phases = [f"phase {name} {phase.epochs * steps:,} steps" for name, phase in training.plan.items()]
        lines.append(", ".join([*phases, f"{steps:,} steps per epoch of {training.batch_size} images each"]))
    notice("; ".join(lines))


def print_skipped(splits: Mapping[str, LabelledImages]) -> None:
    """Print on standard error which images could not be read and were replaced."""
    for name, split in splits.items():
        if (report := split.skipped_report()) is not None:
            notice(f"{name}: {report}.")
