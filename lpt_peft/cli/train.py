"""`lpt-peft train DATA --backbone NAME --output DIR`: train a model; the same command resumes it.

Not here: the training (`lpt_peft.recipe`), the settings (`common/run_settings.py`) and the kinds of DATA
(`common/open_data.py`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lpt_peft._run_folder import SETTINGS
from lpt_peft.cli.common.exit_codes import INCOMPLETE, OK
from lpt_peft.cli.common.extras import requires_extra
from lpt_peft.cli.common.flags import check_method_flags, check_phase_flags, unused_sizes
from lpt_peft.cli.common.messages import notice
from lpt_peft.cli.common.options import Json
from lpt_peft.cli.common.paths import check_new_folder, home_path
from lpt_peft.cli.common.run_settings import RunSettings, read_settings
from lpt_peft.errors import ConfigError, MissingExtraError
from lpt_peft.recipe.presets import preset

Log = Literal["tensorboard", "wandb", "trackio"]


def train_command(words: Sequence[str]) -> Callable[..., int]:
    """Return the sub-command, with the defaults of the --preset or --config among `words`.

    Raises:
        ConfigError: Both are given, the given one cannot be used, or a flag of a phase is out of range.
    """
    if words[:1] == ["train"]:
        check_phase_flags(words)
        check_method_flags(words)
    start = _initial_settings(words if words[:1] == ["train"] else [])

    def train(
        data: tyro.conf.Positional[str],
        /,
        *,
        output: Path,
        run: Annotated[RunSettings, tyro.conf.arg(name="")] = start,
        preset: str | None = None,
        config: Path | None = None,
        resume: bool = True,
        find_lr: bool = False,
        log_with: Log | None = None,
        as_json: Json = False,
    ) -> int:
        """Train a model on long-tailed images; the same command resumes an interrupted run.

        DATA is a folder with a folder for each class, or with train/, val/ and test/ of such folders; a list of
        "path label" lines; a JSON of iNaturalist; cifar100-lt:ROOT; or hf:NAME. See also --root, --val and --test.
        With --unreadable skip, the exit status is 3 if images could not be read; left_out.json lists them.

        Args:
            data: The training images: a folder, a list, a JSON of iNaturalist, cifar100-lt:ROOT or hf:NAME.
            output: Folder for settings.json, checkpoints/, prompts/ or model/, history.json, results.json and
                left_out.json.
            run: Settings of the run.
            preset: Start from published settings: paper or inat2018. Flags override them.
            config: Start from the settings.json of another run. Flags override it.
            resume: Resume from the checkpoints in the output folder; --no-resume deletes them.
            find_lr: Instead of training, find a learning rate for the first phase; writes find_lr.json and find_lr.png.
            log_with: Log metrics to this tracker as well.
            as_json: Print the content of results.json instead of the table.
        """
        for name in unused_sizes(run.prompts, run.training.method):
            notice(f"{name}={getattr(run.prompts, name)!r}: no effect with method {run.training.method}")
        return run_training(data, output, run, resume=resume, find_lr=find_lr, log_with=log_with, as_json=as_json)

    return train


def run_training(
    data: str,
    output: Path,
    run: RunSettings,
    *,
    resume: bool,
    log_with: Log | None,
    as_json: bool,
    find_lr: bool = False,
    with_test: bool = True,
) -> int:
    """Train, save and measure a model; return the exit status; see `train`. Without `with_test`, not on the test split.

    Raises:
        LPTError: Data, backbone, settings or checkpoints are not usable.
        KeyboardInterrupt: Ctrl-C was pressed; the run was saved.
    """
    with requires_extra("lpt-peft train", "train"):
        from lpt_peft.cli.common.build_adapter import build_model
        from lpt_peft.cli.common.find_rate import find_rate
        from lpt_peft.cli.common.open_data import check_output, open_splits, set_transforms
        from lpt_peft.cli.common.streams import print_json, print_text
        from lpt_peft.cli.common.tables import print_results
        from lpt_peft.recipe.experiment import LEFT_OUT, RESULTS, Splits, fit, write_json
        from lpt_peft.recipe.left_out import has_unreadable
        from lpt_peft.recipe.methods import method_of
        from lpt_peft.recipe.train import make_accelerator

    run.check()
    if find_lr and (log_with or not resume):
        flag = "--log-with" if log_with else "--no-resume"
        raise ConfigError(f"{flag} has no effect with --find-lr, which trains nothing: leave it out.")
    if log_with:
        _check_tracker(log_with)
    check_new_folder(output)
    check_output(output, data, run.images)
    splits = open_splits(data, run.images, run.training.seed)
    if not with_test:
        splits.pop("test", None)
    model = build_model(run, splits["train"].class_names)
    model.metadata = replace(model.metadata, preprocess=run.images.preprocess())
    set_transforms(splits, model.preprocess(), run.images)
    accelerator = make_accelerator(run.training, **({"log_with": log_with, "project_dir": output} if log_with else {}))
    if find_lr:
        find_rate(model, splits["train"], run.training, output, accelerator, as_json=as_json)
        return INCOMPLETE if has_unreadable(splits) else OK
    if log_with:
        _start_trackers(accelerator, run)
    settings = run.to_dict()
    if accelerator.is_main_process and not (output / SETTINGS).exists():
        # Settings of an earlier run describe its result, and stay until this run has finished.
        write_json(output / SETTINGS, {"data": data, **settings})
    try:
        results = fit(
            model,
            Splits(**splits),
            run.training,
            output,
            shot_rule=run.shot_rule,
            about={"start_from": run.start_from} | {f"images.{name}": v for name, v in settings["images"].items()},
            accelerator=accelerator,
            resume=resume,
        )
    finally:
        accelerator.end_training()
    status = INCOMPLETE if has_unreadable(splits) else OK
    if not accelerator.is_main_process:
        return status
    write_json(output / SETTINGS, {"data": data, **settings})
    if as_json:
        print_json(json.loads((output / RESULTS).read_bytes()))
        return status
    print_results(results)
    listed = f", {LEFT_OUT}" if (output / LEFT_OUT).exists() else ""
    result = method_of(model, run.training).folder
    print_text(f"Written to {output}/: {result}/, {RESULTS}, history.json, {SETTINGS}{listed}, checkpoints/")
    return status


def _initial_settings(words: Sequence[str]) -> RunSettings | Any:
    """The settings that flags override: of a file, of a preset, or the defaults without a backbone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config")
    given, _ = parser.parse_known_args(list(words))
    if given.preset and given.config:
        raise ConfigError("--preset and --config cannot be combined: give one of them, and flags for the rest.")
    if given.config:
        values = read_settings(home_path(given.config))
        values.pop("data", None)
        named = "backbone" in values
        run = RunSettings.from_dict(values if named else {"backbone": "", **values})
        return run if named else replace(run, backbone=tyro.MISSING)
    start = RunSettings(backbone=tyro.MISSING)
    if given.preset:
        known = preset(given.preset)
        notice(f"preset {given.preset}. {known}")
        images = replace(start.images, crop_pct=known.crop_pct)
        prompts = replace(start.prompts, query=known.query)
        start = replace(start, training=known.settings, shot_rule=known.shot_rule, prompts=prompts, images=images)  # type: ignore[arg-type]
    return start


def _check_tracker(name: Log) -> None:
    libraries = {"tensorboard": ("tensorboard", "tensorboardX")}.get(name, (name,))
    if not any(find_spec(library) for library in libraries):
        raise MissingExtraError(f"--log-with {name} needs that library: pip install {name}.")


def _start_trackers(accelerator: Any, run: RunSettings) -> None:
    settings = run.to_dict()
    flat = {f"{group}.{key}": value for group in ("prompts", "images") for key, value in settings[group].items()}
    flat |= {key: value for key, value in settings["training"].items() if not isinstance(value, dict)}
    plain = {key: value for key, value in flat.items() if isinstance(value, (int, float, str))}
    accelerator.init_trackers("lpt_peft", config={"backbone": run.backbone, **plain})
