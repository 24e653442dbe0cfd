"""fit: a whole run into an output folder: checkpoints, prompts, history, and the numbers it came to.

    checkpoints/   to go on from after a break; may be removed once the run is over
    prompts/       the prompt file
    history.json   a record for each epoch
    results.json   shot metrics of the validation and the test part

Not here: the training (`runs.py`), and where images and backbone come from (`lpt_peft.cli`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from accelerate import Accelerator
from torch.utils.data import Dataset

from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.data.images import LabelledImages
from lpt_peft.errors import StateError
from lpt_peft.metrics import ShotMetrics, ShotResult
from lpt_peft.metrics.result import SHOTS
from lpt_peft.recipe.evaluate import evaluate
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.recipe.train import make_accelerator, train

CHECKPOINTS, PROMPTS, HISTORY, RESULTS = "checkpoints", "prompts", "history.json", "results.json"


class Parts(NamedTuple):
    """The images of a run."""

    train: LabelledImages
    validation: Dataset[Any] | None = None
    test: Dataset[Any] | None = None


def fit(
    adapter: LongTailPromptAdapter,
    parts: Parts,
    settings: TrainSettings,
    output: Path,
    *,
    shot_rule: str = "lpt",
    about: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
    resume: bool = True,
    progress: bool | str = True,
) -> dict[str, ShotResult]:
    """Train, write the prompt file and measure it; the test part is looked at once, when all is decided.

    Args:
        adapter: A wrapped ViT.
        parts: Images with their labels; only `validation` has a say in what is learnt.
        settings: How to train.
        output: Folder to write into; made if need be.
        shot_rule: A name of `lpt_peft.metrics.SHOT_RULES`.
        about: More that tells this run from others, plain JSON, besides the names of classes and of image files; a run
            goes on only where it is the same.
        accelerator: As in `train`.
        resume: As in `train`.
        progress: As in `train`.

    Returns:
        "validation" and "test", as far as there are such parts.

    Raises:
        LPTError: As `train`, and as `adapter.save_pretrained`.
        KeyboardInterrupt: Ctrl-C was pressed; the run was saved and goes on by the same call.
    """
    accelerator = accelerator or make_accelerator(settings)
    metrics = ShotMetrics.from_rule(shot_rule, parts.train.class_counts)
    history = train(
        adapter,
        parts.train,
        parts.train.labels,
        settings,
        validation=parts.validation,
        accelerator=accelerator,
        checkpoints=output / CHECKPOINTS,
        about={**parts.train.about(), **(about or {})},
        shot_rule=shot_rule,
        resume=resume,
        progress=progress,
    )
    results = {
        name: evaluate(
            adapter, part, metrics, num_workers=settings.num_workers, distributed=True, accelerator=accelerator
        )
        for name, part in (("validation", parts.validation), ("test", parts.test))
        if part is not None
    }
    if accelerator.is_main_process:
        figures = {name: {shot: getattr(result, shot) for shot in SHOTS} for name, result in results.items()}
        adapter.save_pretrained(
            output / PROMPTS,
            class_counts=parts.train.class_counts,
            label_names=parts.train.class_names,
            training={"recipe": settings.to_dict(), "metrics": figures, "rule": f"{metrics.rule}; mean over classes"},
        )
        write_json(output / HISTORY, history)
        write_json(output / RESULTS, {name: result.to_dict() for name, result in results.items()})
    accelerator.wait_for_everyone()
    return results


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON: the old content or the new, never half of it.

    Raises:
        StateError: The folder may not be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n", "utf-8")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StateError(
            f"{path} cannot be written: {error}. Choose a folder that can be written, or make room on the disk; what "
            "was there before is whole."
        ) from error
