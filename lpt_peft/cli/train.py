"""`lpt-peft train DATA --backbone NAME --output DIR`: a whole run, which goes on where it was broken off.

Not here: the training (`lpt_peft.recipe`), the flags (`run_settings.py`) and what DATA may be (`sources.py`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lpt_peft.cli.common.extras import extra_needed
from lpt_peft.cli.common.interrupted import telling_how_to_go_on
from lpt_peft.cli.common.options import Json
from lpt_peft.cli.common.run_settings import SETTINGS, RunSettings, read_settings
from lpt_peft.data.transforms import RECIPE_CROP_PCT
from lpt_peft.errors import ConfigError, MissingExtraError
from lpt_peft.recipe.presets import preset

Log = Literal["tensorboard", "wandb", "trackio"]


def train_command(arguments: Sequence[str]) -> Callable[..., None]:
    """The sub-command, whose defaults are those of the --preset or --config among `arguments`.

    Raises:
        ConfigError: Both are given, or one of them cannot be used.
    """
    start = _start(arguments if arguments[:1] == ["train"] else [])

    def train(
        data: tyro.conf.Positional[str],
        /,
        *,
        output: Path,
        run: Annotated[RunSettings, tyro.conf.arg(name="")] = start,
        preset: str | None = None,
        config: Path | None = None,
        resume: bool = True,
        log_with: Log | None = None,
        as_json: Json = False,
    ) -> None:
        """Train prompts on long-tailed images; the same command goes on where a run was broken off.

        Args:
            data: A folder with a folder for each class, or with train/, val/ and test/ of such; a list of "path label"
                lines; a JSON of iNaturalist; cifar100-lt:ROOT; or hf:NAME. See --root, --val and --test.
            output: Folder for settings.json, checkpoints/, prompts/, history.json and results.json.
            run: All that the run is told.
            preset: Begin with published settings: paper or inat2018. Flags come after.
            config: Begin with the settings.json of another run. Flags come after.
            resume: Go on from the checkpoints in the folder; --no-resume throws them away.
            log_with: Where numbers go besides the terminal.
            as_json: Print the content of results.json instead of the table.
        """
        run_training(data, output, run, resume=resume, log_with=log_with, as_json=as_json)

    return train


def run_training(
    data: str, output: Path, run: RunSettings, *, resume: bool, log_with: Log | None, as_json: bool
) -> None:
    """What the command does when its arguments are read.

    Raises:
        LPTError: Whatever is wrong with data, backbone, settings or checkpoints.
        KeyboardInterrupt: Ctrl-C; the run was saved, and the message says how to go on.
    """
    with extra_needed("lpt-peft train", "train"):
        from lpt_peft.cli.common.build_run import build_adapter
        from lpt_peft.cli.common.open_data import open_parts, set_transforms
        from lpt_peft.cli.common.tables import print_results
        from lpt_peft.recipe.experiment import RESULTS, Splits, fit, write_json
        from lpt_peft.recipe.train import make_accelerator

    parts = open_parts(data, run.images, run.training.seed)
    adapter = build_adapter(run, parts["train"].class_names)
    set_transforms(parts, adapter.backbone.preprocess(), run.images)
    accelerator = make_accelerator(run.training, **({"log_with": log_with, "project_dir": output} if log_with else {}))
    if log_with:
        _start_trackers(accelerator, run, log_with)
    told = run.to_dict()
    speaks = accelerator.is_main_process
    if speaks and not (output / SETTINGS).exists():  # an earlier run's belong to its prompts, until this one is done
        write_json(output / SETTINGS, {"data": data, **told})
    try:
        with telling_how_to_go_on():
            results = fit(
                adapter,
                Splits(**parts),
                run.training,
                output,
                shot_rule=run.shot_rule,
                about={"start_from": run.start_from} | {f"images.{name}": v for name, v in told["images"].items()},
                accelerator=accelerator,
                resume=resume,
                progress=sys.stderr.isatty(),
            )
    finally:
        accelerator.end_training()
    if not speaks:
        return
    write_json(output / SETTINGS, {"data": data, **told})
    print_results(results, as_json=as_json)
    if not as_json:
        print(f"Written to {output}/: prompts/, {RESULTS}, history.json, {SETTINGS}, checkpoints/")


def _start(arguments: Sequence[str]) -> RunSettings | Any:
    """The settings that flags change: of a file, of a preset, or the defaults without a backbone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config")
    given, _ = parser.parse_known_args(list(arguments))
    if given.preset and given.config:
        raise ConfigError("--preset and --config both begin the settings; give one of them, and flags for the rest.")
    if given.config:
        values = read_settings(Path(given.config))
        values.pop("data", None)
        named = "backbone" in values
        run = RunSettings.from_dict(values if named else {"backbone": "", **values})
        return run if named else replace(run, backbone=tyro.MISSING)
    start = RunSettings(backbone=tyro.MISSING)
    if given.preset:
        known = preset(given.preset)
        if os.environ.get("RANK", "0") == "0":
            print(f"Preset {given.preset}. {known}", file=sys.stderr)
        images = replace(start.images, crop_pct=RECIPE_CROP_PCT)
        start = replace(start, training=known.settings, shot_rule=known.shot_rule, images=images)  # type: ignore[arg-type]
    return start


def _start_trackers(accelerator: Any, run: RunSettings, name: Log) -> None:
    if not accelerator.log_with:
        raise MissingExtraError(f"--log-with {name} needs that library: pip install {name}.")
    told = run.to_dict()
    flat = {f"{group}.{key}": value for group in ("prompts", "images") for key, value in told[group].items()}
    flat |= {key: value for key, value in told["training"].items() if not isinstance(value, dict)}
    plain = {key: value for key, value in flat.items() if isinstance(value, (int, float, str))}
    accelerator.init_trackers("lpt_peft", config={"backbone": run.backbone, **plain})
