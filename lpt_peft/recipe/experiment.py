"""fit: train, save and evaluate into an output folder.

    checkpoints/   to resume an interrupted run; can be removed afterwards
    prompts/       the prompt file
    history.json   a record per epoch
    results.json   shot metrics of the validation and test splits

Not here: training (`train.py`), and opening data and backbone (`lpt_peft.cli`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from uuid import uuid4

from accelerate import Accelerator
from torch.utils.data import Dataset

from lpt_peft._files import write_atomic
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.data.images import LabelledImages
from lpt_peft.errors import LPTError, StateError
from lpt_peft.metrics import ShotMetrics, ShotResult
from lpt_peft.metrics.result import SHOTS
from lpt_peft.recipe.checks import check_evaluation_split
from lpt_peft.recipe.evaluate import evaluate
from lpt_peft.recipe.parallel import on_main_process
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.recipe.train import make_accelerator, train

_CHOOSE = "Choose another folder, change its permissions, or free disk space."
CHECKPOINTS, PROMPTS, HISTORY, RESULTS = "checkpoints", "prompts", "history.json", "results.json"


class Splits(NamedTuple):
    """Images of a run."""

    train: LabelledImages
    validation: Dataset[Any] | None = None
    test: Dataset[Any] | None = None


def fit(
    adapter: LongTailPromptAdapter,
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
    """Train, write the prompt file and evaluate; the test split is used once, after all choices are made.

    Args:
        adapter: A wrapped ViT.
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
        LPTError: As `train`, and as `adapter.save_pretrained`.
        KeyboardInterrupt: Ctrl-C was pressed; the run was saved, and the same call resumes it.
    """
    accelerator = accelerator or make_accelerator(settings)
    metrics = ShotMetrics.from_rule(shot_rule, splits.train.class_counts)

    def save(folder: Path, figures: Mapping[str, Mapping[str, float | None]]) -> None:
        adapter.save_pretrained(
            folder,
            class_counts=splits.train.class_counts,
            label_names=splits.train.class_names,
            training={
                "recipe": settings.to_dict(),
                "metrics": figures,
                "rule": f"{metrics.rule}; mean over classes",
            },
        )

    def check() -> None:
        check_folder(output)
        # Everything that the writer refuses must be found before training.
        with write_errors(output, _CHOOSE), TemporaryDirectory(prefix=".trial-", dir=output) as trial:
            save(Path(trial), dict.fromkeys(("validation", "test"), dict.fromkeys(SHOTS, 1 / 3)))

    on_main_process(accelerator, check)
    if splits.test is not None:
        check_evaluation_split(adapter.to(accelerator.device), splits.test, "test", accelerator)
    history = train(
        adapter,
        splits.train,
        splits.train.labels,
        settings,
        validation=splits.validation,
        accelerator=accelerator,
        checkpoints=output / CHECKPOINTS,
        about={**splits.train.about(), **(about or {})},
        shot_rule=shot_rule,
        resume=resume,
        progress=progress,
    )
    results = {
        name: evaluate(
            adapter, split, metrics, num_workers=settings.num_workers, distributed=True, accelerator=accelerator
        )
        for name, split in (("validation", splits.validation), ("test", splits.test))
        if split is not None
    }

    def write() -> None:
        figures = {name: {shot: getattr(result, shot) for shot in SHOTS} for name, result in results.items()}
        with write_errors(output, "Training is complete and saved: fix the cause and run the same command again."):
            save(output / PROMPTS, figures)
        write_json(output / HISTORY, history)
        write_json(output / RESULTS, {name: result.to_dict() for name, result in results.items()})

    on_main_process(accelerator, write)
    return results


def check_folder(folder: Path) -> None:
    """Check that a file can be written into a folder, which is created if missing.

    Raises:
        StateError: It is not a folder, or not writable; the message names the reason.
    """
    probe = folder / f".{uuid4().hex}"
    with write_errors(folder, _CHOOSE):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"lpt_peft")
        finally:
            with suppress(OSError):
                probe.unlink()


@contextmanager
def write_errors(folder: Path, cure: str) -> Iterator[None]:
    """Raise errors of the operating system as `StateError`, with the folder, the reason and a cure.

    Raises:
        StateError: Instead of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, LPTError):
            raise
        raise StateError(f"The output folder {folder} is not writable: {error.strerror or error}. {cure}") from error


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
