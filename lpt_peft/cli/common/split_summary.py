"""What each split contains, and what was left out of it.

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
