"""Train LPT on Accelerate: settings, one loop for all phases and methods, resume, evaluation.

A recipe rather than a trainer: read `training/loop.py` and `training/phase.py`, copy them, change them. Losses,
samplers and metrics do not depend on this package. It needs the extra `lpt_peft[train]`.

    train.py, experiment.py   run phases; run, save and evaluate into an output folder
    settings.py, presets.py   configuration; rates.py has default learning rates, settings_checks.py the rules
    training/                 one phase: initialization, loop, step, optimizer, schedule
    learning_rate/            range test that suggests a learning rate
    loading/                  batches, worker processes, validation split
    resume/                   checkpoints, folders, Ctrl-C
    summary.py, progress.py   output on stderr
    evaluate.py, predictions.py, checks.py, parallel.py

Public names are imported on first use, so reading settings imports neither torch nor Accelerate.
"""

from typing import TYPE_CHECKING

from lpt_peft._lazy import import_on_first_use

if TYPE_CHECKING:
    from lpt_peft.recipe.evaluate import evaluate, predict
    from lpt_peft.recipe.experiment import Splits, fit
    from lpt_peft.recipe.learning_rate.curve import LearningRateCurve
    from lpt_peft.recipe.learning_rate.find import find_learning_rate
    from lpt_peft.recipe.learning_rate.plot import draw_learning_rates
    from lpt_peft.recipe.predictions import PredictionRecorder, Predictions, read_predictions, write_predictions
    from lpt_peft.recipe.presets import PRESETS, preset
    from lpt_peft.recipe.rates import DEFAULT_RATES
    from lpt_peft.recipe.settings import PhaseSettings, TrainSettings
    from lpt_peft.recipe.train import make_accelerator, run_phase, train
    from lpt_peft.recipe.training.schedule import warmup_cosine

__all__ = [
    "DEFAULT_RATES",
    "PRESETS",
    "LearningRateCurve",
    "PhaseSettings",
    "PredictionRecorder",
    "Predictions",
    "Splits",
    "TrainSettings",
    "draw_learning_rates",
    "evaluate",
    "find_learning_rate",
    "fit",
    "make_accelerator",
    "predict",
    "preset",
    "read_predictions",
    "run_phase",
    "train",
    "warmup_cosine",
    "write_predictions",
]

import_on_first_use(  # the imports above at run time; a test compares the two
    __name__,
    {
        "evaluate": ["evaluate", "predict"],
        "experiment": ["Splits", "fit"],
        "learning_rate.curve": ["LearningRateCurve"],
        "learning_rate.find": ["find_learning_rate"],
        "learning_rate.plot": ["draw_learning_rates"],
        "predictions": ["PredictionRecorder", "Predictions", "read_predictions", "write_predictions"],
        "presets": ["PRESETS", "preset"],
        "rates": ["DEFAULT_RATES"],
        "train": ["make_accelerator", "run_phase", "train"],
        "training.schedule": ["warmup_cosine"],
        "settings": ["PhaseSettings", "TrainSettings"],
    },
)
