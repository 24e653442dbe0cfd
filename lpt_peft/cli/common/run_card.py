"""Results and the accuracy picture of a run, for the model card of its prompts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpt_peft._json import loads
from lpt_peft.checkpoint import PromptContent
from lpt_peft.errors import InputError, MissingExtraError
from lpt_peft.recipe.experiment import RESULTS

PICTURE = "accuracy.png"


def run_card(folder: Path, content: PromptContent) -> tuple[Mapping[str, Any] | None, dict[str, bytes]]:
    """Read `results.json` of a run and draw its accuracy; a warning says why the card has less.

    Args:
        folder: Output folder of a run; any other folder has no results.
        content: Its prompts.

    Returns:
        The results, None if there are none of these prompts; and pictures by name.
    """
    from lpt_peft.analysis.plots import plot_class_rows, png
    from lpt_peft.hub import results_of_split

    path = folder / RESULTS
    if not path.is_file():
        return None, {}
    try:
        results = loads(path.read_bytes(), str(path), InputError)
        if not results:  # a run without a validation or test split
            return None, {}
        details = results_of_split(content, results)
    except (InputError, OSError) as error:
        warnings.warn(f"The card shows no details and no picture of {path}. {error}", UserWarning, stacklevel=2)
        return None, {}
    assert details is not None  # noqa: S101 - narrows the type
    try:
        return results, {PICTURE: png(plot_class_rows(details["classes"]))}
    except MissingExtraError as error:
        warnings.warn(f"The card has no picture of the accuracy. {error}", UserWarning, stacklevel=2)
        return results, {}
