"""What each split contains, what was left out of it, and which images could not be read.

Not here: the summary of a training, which describes its training images, phases and device (`lpt_peft.recipe.summary`).
"""

from __future__ import annotations

from collections.abc import Mapping

from lpt_peft.cli.common.messages import notice
from lpt_peft.data.images import LabelledImages


def print_summaries(splits: Mapping[str, LabelledImages]) -> None:
    """Print images, classes and left-out files of each split on standard error."""
    for name, split in splits.items():
        for line in str(split.summary).splitlines():
            notice(f"{name}: {line}")


def print_skipped(splits: Mapping[str, LabelledImages]) -> None:
    """Print on standard error which images could not be read and were replaced."""
    for name, split in splits.items():
        if (report := split.skipped_report()) is not None:
            notice(f"{name}: {report}.")
