"""Training LPT in two phases on Accelerate: settings, one loop for both phases, resume, evaluation.

A recipe, not a trainer: read `loop.py` and `phase.py`, copy them, change them. Losses, samplers and metrics are
products of their own and know nothing of this package. Needs the extra `lpt_peft[train]`.
Public names are imported on first use, so that reading settings (`settings.py`) imports neither torch nor Accelerate.
"""

from typing import TYPE_CHECKING

from lpt_peft._lazy import import_on_first_use

if TYPE_CHECKING:
    from lpt_peft.recipe.evaluate import evaluate, predict
    from lpt_peft.recipe.experiment import Parts, fit
    from lpt_peft.recipe.presets import PRESETS, preset
    from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
    from lpt_peft.recipe.train import make_accelerator, run_phase, train
    from lpt_peft.recipe.training.schedule import warmup_cosine

__all__ = [
    "PRESETS",
    "Parts",
    "PhaseSettings",
    "TrainSettings",
    "evaluate",
    "fit",
    "make_accelerator",
    "predict",
    "preset",
    "run_phase",
    "train",
    "warmup_cosine",
]

import_on_first_use(  # the imports above, for the interpreter: a test holds the two equal
    __name__,
    {
        "evaluate": ["evaluate", "predict"],
        "experiment": ["Parts", "fit"],
        "presets": ["PRESETS", "preset"],
        "train": ["make_accelerator", "run_phase", "train"],
        "training.schedule": ["warmup_cosine"],
        "settings": ["PhaseSettings", "TrainSettings"],
    },
)
