"""`lpt-peft evaluate DIR [DATA]`: measure a finished run from its saved files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from lpt_peft.cli.common.exit_codes import INCOMPLETE, OK
from lpt_peft.cli.common.extras import requires_extra
from lpt_peft.cli.common.messages import notice
from lpt_peft.cli.common.options import Json
from lpt_peft.errors import ConfigError, InputError

if TYPE_CHECKING:
    from lpt_peft.recipe.settings import TrainSettings


def evaluate(
    folder: tyro.conf.Positional[Path],
    data: tyro.conf.Positional[str | None] = None,
    /,
    crops: Literal[1, 5] = 1,
    post_hoc_tau: float = 0.0,
    as_json: Json = False,
) -> int:
    """Measure a trained model on the validation and test splits of its data, or on other images.

    Images that cannot be read are left out of the counts if the run was trained with --unreadable skip; the exit status
    is then 3.

    Args:
        folder: Output folder of `lpt-peft train`, or a prompt file or model file.
        data: Images, as for `lpt-peft train`; a folder of class folders, or a list, is a test split.
        crops: 5 averages log p over the centre and the corners of each image, as LIFT does, in five times the time.
        post_hoc_tau: Subtract this times the log shares of the training images; 1 for training with cross-entropy.
        as_json: Print one JSON object instead of the table.
    """
    with requires_extra("lpt-peft evaluate", "train"):
        from lpt_peft.cli.common.load_run import available_precision, class_counts_of, load_run
        from lpt_peft.cli.common.open_data import open_splits, open_test_splits, set_transforms
        from lpt_peft.cli.common.split_summary import print_summaries
        from lpt_peft.cli.common.streams import print_json
        from lpt_peft.cli.common.tables import print_extremes, print_results
        from lpt_peft.metrics import ShotMetrics, ShotResult
        from lpt_peft.recipe.class_report import split_results
        from lpt_peft.recipe.evaluate import evaluate as measure
        from lpt_peft.recipe.left_out import has_unreadable
        from lpt_peft.recipe.predictions import PredictionRecorder
        from lpt_peft.recipe.progress import Reporter
        from lpt_peft.recipe.train import make_accelerator

    if not 0 <= post_hoc_tau < float("inf"):
        raise ConfigError(f"--post-hoc-tau {post_hoc_tau} must be at least 0 and finite.")
    run = load_run(folder)
    counts = class_counts_of(run, folder)
    if data is None and run.data is None:
        raise ConfigError(f"{folder} does not name its training data; name the images: lpt-peft evaluate DIR DATA.")
    if data is None:
        splits = open_splits(str(run.data), run.images, run.training.seed)
        splits.pop("train")
    else:
        splits = open_test_splits(data, run.images, run.training.seed, run.class_names)
    if not splits:
        raise InputError(
            f"{data or run.data} has neither a validation nor a test split, so there is nothing to evaluate. Name the "
            "images: lpt-peft evaluate DIR DATA."
        )
    if post_hoc_tau and run.data is not None:
        _note_other_loss(run.training)
    set_transforms(splits, run.model.preprocess(), run.images, crops=crops)
    metrics = ShotMetrics.from_rule(run.shot_rule, counts)
    accelerator = make_accelerator(available_precision(run.training))
    print_summaries(splits)
    notice(f"device {accelerator.device}")
    results: dict[str, ShotResult] = {}
    entries: dict[str, dict[str, Any]] = {}
    workers = run.training.num_workers
    with Reporter(True, accelerator.is_main_process).unreadable_images(**splits):
        for name in ("validation", "test"):
            if name in splits:
                recorder = PredictionRecorder()
                results[name] = measure(
                    run.model,
                    splits[name],
                    metrics,
                    num_workers=workers,
                    accelerator=accelerator,
                    crops=crops,
                    post_hoc_tau=post_hoc_tau,
                    recorder=recorder,
                )
                assert recorder.result is not None  # noqa: S101 - narrows the type
                entries[name] = split_results(results[name], recorder.result, run.class_names, counts, metrics.rule)
    if as_json:
        print_json(entries)
    else:
        print_results(results)
        for name, result in results.items():
            print_extremes(result, run.class_names, counts, name)
    return INCOMPLETE if has_unreadable(splits) else OK


def _note_other_loss(training: TrainSettings) -> None:
    """Report that post-hoc adjustment does not fit the loss or sampling of a run."""
    loss, sampling = training.loss, training.sampling
    if loss not in ("cross_entropy", "focal") or sampling != "instance":
        notice(
            f"--post-hoc-tau is for runs with --loss cross_entropy --sampling instance; this run was trained with "
            f"loss {loss} and sampling {sampling}, which account for class frequencies already"
        )
