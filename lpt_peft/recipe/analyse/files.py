"""Files of an analysis: `analysis.json` and a picture of each of its sections."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpt_peft._files import make_folder, write_atomic
from lpt_peft.analysis.plots import figures, png
from lpt_peft.recipe.experiment import write_json
from lpt_peft.recipe.resume.folders import write_errors

ANALYSIS, ANALYSIS_FOLDER = "analysis.json", "analysis"


def write_analysis(analysis: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `analysis.json` and pictures into a folder, which is created if missing; return the paths.

    Args:
        analysis: Result of `analyse`.
        folder: Usually `analysis` in the output folder of the run.

    Raises:
        StateError: The folder is not writable, or the disk is full.
        MissingExtraError: matplotlib is not installed.
    """
    pictures = {f"{name}.png": png(figure) for name, figure in figures(analysis).items()}
    with write_errors(folder):
        make_folder(folder)
        for name, content in pictures.items():
            write_atomic(folder / name, content)
    write_json(folder / ANALYSIS, analysis)
    return [folder / ANALYSIS, *(folder / name for name in pictures)]
