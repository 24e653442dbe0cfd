"""`lpt-peft report RUN [RUN ...] [DATA]`: write an HTML page about finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from lpt_peft._run_folder import SETTINGS
from lpt_peft.cli.common.exit_codes import INCOMPLETE, OK
from lpt_peft.cli.common.extras import requires_extra
from lpt_peft.cli.common.options import Json
from lpt_peft.errors import ConfigError, InputError

if TYPE_CHECKING:
    from lpt_peft.data.images import LabelledImages


def report(
    runs: tyro.conf.Positional[tuple[str, ...]],
    /,
    *,
    output: Path | None = None,
    analysis: bool = True,
    max_images: int = 10_000,
    max_variant_images: int = 2_000,
    as_json: Json = False,
) -> int:
    """Write a page about a finished run, RUN/report.html: a single file that needs no network.

    Arguments are RUN [DATA], or RUN RUN ... [DATA] for several runs side by side. A folder with settings.json or
    results.json is a run; the last argument may be DATA, images as for `lpt-peft train`. Runs that were not analysed
    are analysed first, as by `lpt-peft analyse`. The exit status is 3 if images could not be read.

    Args:
        runs: Output folders of `lpt-peft train`, and images if they are not those of the run.
        output: The file; by default RUN/report.html, or comparison.html in the first of several runs.
        analysis: Analyse runs that were not analysed; --no-analysis reports their stored predictions alone.
        max_images: Most images whose features are compared by the analysis.
        max_variant_images: Most images that the analysis measures with other groups, noise and blur.
        as_json: Print path, size and left-out parts as JSON.
    """
    with requires_extra("lpt-peft report", "analysis"):
        import jinja2  # noqa: F401 - before the passes, not after them
        import matplotlib  # noqa: F401
    with requires_extra("lpt-peft report", "train"):
        from lpt_peft.cli.common.messages import notice
        from lpt_peft.cli.common.streams import print_json, print_text
        from lpt_peft.report import write_comparison, write_report

    folders, data = _split(runs)
    incomplete = False
    if analysis:
        for folder in folders:
            incomplete |= _analyse(folder, data, max_images, max_variant_images)
    if len(folders) > 1:
        written = write_comparison(folders, output=output, partial=not analysis)
    else:
        images, reason = _open(folders[0], data)
        written = write_report(
            folders[0],
            output=output,
            partial=not analysis,
            images=images,
            no_images=reason,
            command=_command(folders[0]),
        )
    if as_json:
        print_json({"report": str(written.path), "bytes": written.size, "left_out": written.left_out})
    else:
        for part, reason in written.left_out.items():
            notice(f"left out: {part}: {reason}")
        print_text(f"Written to {written.path} ({written.size / 1e6:.1f} MB)")
    return INCOMPLETE if incomplete or written.unreadable else OK


def _split(words: tuple[str, ...]) -> tuple[list[Path], str | None]:
    """Folders of runs, and DATA if the last word is not a run.

    Raises:
        InputError: There is no run, or another word than the last is not a run.
    """
    from lpt_peft.report.files import check_finished, is_run

    if not words:
        raise InputError("Name the output folder of lpt-peft train: lpt-peft report RUN.")
    has_data = len(words) > 1 and not is_run(Path(words[-1]))
    if has_data and not Path(words[-1]).exists() and ":" not in words[-1]:
        raise InputError(f"{words[-1]} does not exist: the last argument must be a run or the images of the runs.")
    folders = [Path(word) for word in (words[:-1] if has_data else words)]
    for folder in folders:
        check_finished(folder)
    return folders, words[-1] if has_data else None


def _analyse(folder: Path, data: str | None, max_images: int, max_variant_images: int) -> bool:
    """Analyse a run that was not analysed on these images; return whether images could not be read."""
    from lpt_peft.cli.analyse import analyse_run
    from lpt_peft.cli.common.messages import notice
    from lpt_peft.report.files import analysed_source

    source = analysed_source(folder)
    if source is not None and (data is None or Path(source) == Path(data)):
        return False
    notice(f"{folder} is analysed first" + ("" if source is None else f": its analysis is of {source}"))
    return analyse_run(folder, data, shifts={}, max_images=max_images, max_variant_images=max_variant_images).incomplete


def _open(folder: Path, data: str | None) -> tuple[LabelledImages | None, str]:
    """The split that was analysed, of DATA or of the run's own data; or None and the reason."""
    from lpt_peft.cli.common.open_data import open_splits, open_test_splits
    from lpt_peft.cli.common.run_settings import RunSettings, read_settings
    from lpt_peft.report.files import read_run

    run = read_run(folder, partial=True)
    split, names = run.analysis["data"]["split"], run.analysis["classes"]["name"]
    values = read_settings(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    own = values.pop("data", None)
    settings = RunSettings.from_dict({"backbone": "none", **values})
    if data is not None:
        splits = open_test_splits(data, settings.images, settings.training.seed, names)
    elif own is None:
        return None, f"{folder} does not name its data. Give DATA after RUN."
    else:
        try:
            splits = open_splits(str(own), settings.images, settings.training.seed)
        except InputError as error:
            return None, f"The images of the run cannot be opened: {error} Give DATA after RUN."
    if split not in splits:
        return None, f"The data has no {split} split. Give DATA after RUN."
    return splits[split], ""


def _command(folder: Path) -> list[str] | None:
    """The command that trains the run again, into a folder beside it; None if its settings are not those of train."""
    from lpt_peft.cli.common.run_settings import read_settings
    from lpt_peft.cli.common.train_words import train_words

    try:
        values: dict[str, Any] = read_settings(folder / SETTINGS)
        return train_words(values, f"{folder}-again") if "data" in values else None
    except ConfigError:
        return None
