"""An analysis without passes over images, from the predictions that a run stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpt_peft._run_folder import MODEL, MODEL_METHODS, PROMPTS
from lpt_peft._version import __version__
from lpt_peft.checkpoint import read_prompt_file
from lpt_peft.checkpoint.description import content_fields
from lpt_peft.checkpoint.model_file import read_model_config
from lpt_peft.config import PromptConfig, PromptMetadata
from lpt_peft.errors import InputError, StateError
from lpt_peft.metrics.shot_rules import SHOT_RULES
from lpt_peft.recipe.analyse import sections
from lpt_peft.recipe.analyse.probe import Measured
from lpt_peft.recipe.predictions import Predictions

_REASON = "it needs passes over images, which --no-analysis leaves out. Run lpt-peft analyse, then lpt-peft report"


def partial_analysis(
    folder: Path, predictions: Mapping[str, Predictions], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe the stored predictions of a run.

    Args:
        folder: Output folder with the prompt file or model file, which has the names and counts of the classes.
        predictions: By split; "test" is described, or "validation" if there is no test split.
        settings: Content of settings.json, which has the method and the shot rule; empty for the defaults.

    Returns:
        The result of `lpt_peft.recipe.analyse.analyse` without features, pool and shift.

    Raises:
        StateError: The run stored no predictions.
        InputError: The file of the model has no class counts, or other classes than the predictions.
    """
    split = next((name for name in ("test", "validation") if name in predictions), None)
    if split is None:
        raise StateError(
            f"{folder} has no predictions on a test or validation split, so there is nothing to report without an "
            f"analysis. Name the images: lpt-peft report {folder} DATA."
        )
    method, phase, config, metadata = _model(folder, settings.get("training", {}))
    shot_rule = settings.get("shot_rule", "lpt")
    found = predictions[split]
    counts = metadata.class_counts
    if counts is None or max(found.target.max(), found.prediction.max()) >= len(counts):
        raise InputError(
            f"The model in {folder} has no class counts, or fewer classes than its predictions. Run the same lpt-peft "
            "train command again, which writes both."
        )
    size = len(counts)
    names = list(metadata.label_names or map(str, range(size)))
    groups = config.pool_size if config is not None and phase == "group" and found.groups is not None else None
    measured = Measured(
        target=found.target,
        prediction=found.prediction,
        probability=found.probability,
        groups=found.target.new_empty(len(found.target), 0) if found.groups is None else found.groups,
        features={},
        variants={},
    )
    left_out = dict.fromkeys(("features", "projection", "shift", "temperature"), _REASON)
    if groups is None:
        left_out["matching"] = left_out["pool"] = "the model selects no groups"
    else:
        left_out["pool"] = _REASON
    analysis = {
        "format_version": 1,
        "lpt_peft": __version__,
        "seconds": 0.0,
        "model": {
            "method": method,
            "phase": phase,
            "classes": size,
            "groups": groups,
            "top_k": None if groups is None or config is None else config.top_k,
        },
        "data": {
            "source": str(folder),
            "split": split,
            "images": len(found.target),
            "shot_rule": str(SHOT_RULES[shot_rule]),
            "feature_images": 0,
            "train_images": None,
            "variant_images": 0,
        },
        "left_out": left_out,
        **sections.prediction_sections(measured, names, counts, shot_rule),
    }
    if groups is not None:
        analysis["matching"] = sections.matching_section(measured, size, groups)
    return analysis


def _model(folder: Path, training: Mapping[str, Any]) -> tuple[str, str | None, PromptConfig | None, PromptMetadata]:
    """Method, phase, sizes and metadata of the prompt file or model file of a run."""
    if (folder / MODEL).is_dir() and (training.get("method") in MODEL_METHODS or not (folder / PROMPTS).is_dir()):
        config = read_model_config(folder / MODEL)  # the weights may be large
        return config["method"], None, None, content_fields(config)["metadata"]
    prompts = read_prompt_file(folder / PROMPTS)
    return training.get("method", "lpt"), prompts.phase, prompts.config, prompts.metadata
