"""`lpt-peft train --find-lr`: the learning-rate range test, its files and its message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lpt_peft.cli.common.messages import notice
from lpt_peft.cli.common.streams import print_json, print_text
from lpt_peft.data.images import LabelledImages
from lpt_peft.recipe.experiment import write_json
from lpt_peft.recipe.learning_rate.curve import LearningRateCurve
from lpt_peft.recipe.learning_rate.find import find_learning_rate
from lpt_peft.recipe.learning_rate.plot import draw_learning_rates
from lpt_peft.recipe.parallel import on_main_process
from lpt_peft.recipe.rates import base_rate_field
from lpt_peft.recipe.resume.folders import check_folder
from lpt_peft.recipe.settings import TrainSettings

FILE, PICTURE = "find_lr.json", "find_lr.png"


def find_rate(
    model: Any,
    images: LabelledImages,
    settings: TrainSettings,
    output: Path,
    accelerator: Accelerator,
    *,
    as_json: bool,
) -> None:
    """Test the first phase of the settings; print the suggestion and write `find_lr.json` and `find_lr.png`.

    Args:
        model: Model of the run.
        images: Training images.
        settings: Settings of the run.
        output: Folder to write into; created if missing.
        accelerator: Its processes must all call this.
        as_json: Print the content of find_lr.json instead of sentences.

    Raises:
        LPTError: As `find_learning_rate`; or the folder is not writable.
    """
    on_main_process(accelerator, lambda: check_folder(output))
    curve = find_learning_rate(model, images, images.labels, settings, accelerator=accelerator)
    if not accelerator.is_main_process:
        return
    content = {**curve.to_dict(), "batch_size": settings.batch_size, "optimizer": settings.optimizer}
    write_json(output / FILE, content)
    written = f"{FILE}, {PICTURE}" if _drawn(curve, output / PICTURE) else FILE
    if as_json:
        print_json(content)
        return
    print_text(_sentence(curve, settings))
    print_text(f"Written to {output}/: {written}")


def _drawn(curve: LearningRateCurve, path: Path) -> bool:
    try:
        draw_learning_rates(curve, path)
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        notice(f"{path.name} needs {library}: pip install {library}.")
        return False
    return True


def _sentence(curve: LearningRateCurve, settings: TrainSettings) -> str:
    smoothed, rates = curve.smoothed, curve.rates
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    tested = f"{len(rates)} steps of {settings.batch_size} images, rates from {rates[0]:.3g} to {rates[-1]:.3g}"
    if curve.suggestion is None:
        return (
            f"Phase {curve.phase}, {tested}: the loss did not fall by more than its noise, so there is no suggestion. "
            "Check the labels and images, or use a larger batch_size."
        )
    phase, field = "group" if curve.phase == "group" else "shared", base_rate_field(settings)
    return (
        f"Phase {curve.phase}, {tested}: the loss fell from {smoothed[0]:.3g} to {smoothed[lowest]:.3g} at "
        f"{rates[lowest]:.2g}. Suggestion: --{phase}.{field.replace('_', '-')} {curve.suggestion:g}"
    )
