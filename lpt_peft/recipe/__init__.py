"""Training LPT in two phases on Accelerate: settings, one loop for both phases, evaluation.

A recipe, not a trainer: read `loop.py`, copy it, change it. Losses, samplers and metrics are products of
their own and know nothing of this package. Needs the extra `lpt_peft[train]`.
"""

from lpt_peft.recipe.evaluate import evaluate, predict
from lpt_peft.recipe.loop import run_phase, train
from lpt_peft.recipe.schedule import warmup_cosine
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings

__all__ = ["PhaseSettings", "TrainSettings", "evaluate", "predict", "run_phase", "train", "warmup_cosine"]
