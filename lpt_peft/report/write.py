"""write_report and write_comparison: a page about a run, and about several runs side by side."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lpt_peft._files import write_atomic
from lpt_peft._version import __version__
from lpt_peft.analysis.plots import figures
from lpt_peft.data.images import LabelledImages
from lpt_peft.errors import InputError
from lpt_peft.metrics.result import SHOTS
from lpt_peft.recipe.resume.folders import write_errors
from lpt_peft.report import comparison
from lpt_peft.report.answers import Answer, answers
from lpt_peft.report.classes import Column, Table, class_table, clip, count, csv_link, percent, points, with_interval
from lpt_peft.report.curves import plot_histories, plot_history, plot_runs
from lpt_peft.report.facts import facts, results_table, settings_table
from lpt_peft.report.files import RunFiles, read_run
from lpt_peft.report.gallery import Gallery, gallery
from lpt_peft.report.page import Picture, picture, render
from lpt_peft.report.pictures import SECTIONS, describe

REPORT, COMPARISON = "report.html", "comparison.html"


class WrittenReport(NamedTuple):
    """A page that was written."""

    path: Path
    size: int
    """In bytes."""
    left_out: dict[str, str]
    """Reason and cure by the part that is left out."""
    unreadable: int
    """Images of the gallery that were skipped because they cannot be read."""


def write_report(
    folder: Path,
    *,
    output: Path | None = None,
    analysis: Mapping[str, Any] | None = None,
    partial: bool = False,
    images: LabelledImages | None = None,
    no_images: str = "the images were not given",
    command: Sequence[str] | None = None,
) -> WrittenReport:
    """Write a page about a finished run: a single HTML file with its pictures, which needs no network.

    Args:
        folder: Output folder of `lpt-peft train` or `lpt_peft.recipe.fit`.
        output: The file; by default `report.html` in the folder.
        analysis: Result of `lpt_peft.recipe.analyse.analyse`; None reads `analysis/analysis.json` in the folder.
        partial: If there is no analysis, report the stored predictions alone.
        images: The split that was analysed, for thumbnails of mistakes, with any transform.
        no_images: Reason, if there are no `images`.
        command: Words of a command that trains the run again.

    Raises:
        InputError: The folder is not the output folder of a run.
        StateError: The run is not finished, it was not analysed, a file is damaged, or the page cannot be written.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    run = read_run(folder, analysis=analysis, partial=partial)
    analysis = run.analysis
    left_out = {**{name: str(reason) for name, reason in analysis["left_out"].items()}, **run.missing}
    pictures = _pictures(run)
    found = _gallery(run, images, no_images)
    if isinstance(found, str):
        left_out["mistakes"] = found
    text = found if isinstance(found, str) else _gallery_text(found)
    no_command = run.missing.get("settings", "the settings of the run are not those of lpt-peft train")
    shots = [shot for shot in SHOTS if analysis["accuracy"][shot] is not None]
    sections = [(id, heading, [n for n in names if n in pictures]) for id, heading, names in SECTIONS]
    sections = [section for section in sections if section[2]]
    content = render(
        "run.html",
        version=__version__,
        title=f"Report on {clip(run.name, 120)}",
        subtitle=_subtitle(run),
        answers=answers(analysis),
        sections=[
            ("tail", "Long tail"),
            ("classes", "Classes"),
            ("mistakes", "Mistakes"),
            *((id, heading) for id, heading, _ in sections),
            ("settings", "Data and settings"),
            ("again", "Run it again"),
        ],
        pictures=pictures,
        picture_sections=sections,
        shot_rule=f"Classes by their n training images: {analysis['data']['shot_rule']}.",
        accuracy=Table(
            [Column("classes", "text"), Column("mean accuracy", "number"), Column("number of classes", "number")],
            [[shot, with_interval(analysis["accuracy"][shot]), _count(analysis, shot)] for shot in shots],
        ),
        classes=class_table(analysis),
        csv=csv_link(analysis),
        gallery=None if isinstance(found, str) else found,
        gallery_text=text,
        facts=facts(run),
        results=results_table(run),
        settings=settings_table(run),
        command=shlex.join(command) if command else None,
        no_command=no_command,
        left_out=left_out,
    )
    path = output or folder / REPORT
    return WrittenReport(path, _write(path, content), left_out, 0 if isinstance(found, str) else found.unreadable)


def write_comparison(folders: Sequence[Path], *, output: Path | None = None, partial: bool = False) -> WrittenReport:
    """Write a page about several finished runs: accuracies, paired differences to the first run, curves and classes.

    Args:
        folders: Output folders, at least two.
        output: The file; by default `comparison.html` in the first folder.
        partial: Report the stored predictions alone of runs that were not analysed.

    Raises:
        InputError: A folder is not the output folder of a run, is given twice, or there are less than two.
        StateError: As for `write_report`.
        MissingExtraError: As for `write_report`.
    """
    if len(folders) < 2:
        raise InputError("A comparison needs at least two runs: name further folders.")
    runs = [read_run(folder, partial=partial) for folder in folders]
    names = comparison.run_names(runs)
    named = dict(zip(names, runs, strict=True))
    differences, reasons = comparison.differences(runs, names)
    histories = {name: run.history for name, run in named.items() if run.history}
    pictures = {
        "runs": picture(
            plot_runs({name: run.analysis["accuracy"] for name, run in named.items()}),
            "Accuracy of each run with its interval, as in the table above.",
            "Mean accuracy over classes, with 95 % intervals.",
        )
    }
    if histories:
        pictures["curves"] = picture(
            plot_histories(histories),
            "Training loss and validation accuracy of the runs.",
            "Epochs of all phases in sequence.",
        )
    left_out = {f"{name}: {part}": reason for name, run in named.items() for part, reason in run.missing.items()}
    content = render(
        "comparison.html",
        version=__version__,
        title=f"Comparison of {count(len(runs), 'run')}",
        subtitle=", ".join(names),
        answers=_comparison_answers(named, differences),
        accuracy=comparison.accuracy_table(runs, names),
        figures=comparison.figures_table(runs, names),
        pictures=pictures,
        differences=comparison.differences_table(differences),
        reasons=reasons,
        first=names[0],
        classes=comparison.classes_table(runs, names),
        settings=comparison.settings_table(runs, names),
        left_out=left_out,
    )
    path = output or folders[0] / COMPARISON
    return WrittenReport(path, _write(path, content), left_out | reasons, 0)


def _write(path: Path, content: str) -> int:
    data = content.encode("utf-8", "replace")
    with write_errors(path.parent):
        write_atomic(path, data)
    return len(data)


def _subtitle(run: RunFiles) -> str:
    data, model = run.analysis["data"], run.analysis["model"]
    backbone = run.settings.get("backbone")
    on = f" on {clip(str(backbone))}" if backbone else ""
    return (
        f"{comparison.method_name(run.analysis)}{on}: {count(data['images'], 'image')} of the {data['split']} split, "
        f"{count(model['classes'], 'class')}"
    )


def _count(analysis: Mapping[str, Any], shot: str) -> str:
    shots = analysis["classes"]["shots"]
    return f"{len(shots) if shot == 'overall' else shots.count(shot):,}"


def _pictures(run: RunFiles) -> dict[str, Picture]:
    drawn = dict(figures(run.analysis))
    if run.history:
        drawn["curves"] = plot_history(run.history)
    return {name: picture(figure, *describe(name, run.analysis)) for name, figure in drawn.items()}


def _gallery(run: RunFiles, images: LabelledImages | None, no_images: str) -> Gallery | str:
    split = run.analysis["data"]["split"]
    if split not in run.predictions:
        return run.missing.get("mistakes", f"The run stored no predictions on the {split} split.")
    if images is None:
        return no_images
    return gallery(run.predictions[split], images, run.analysis["classes"])


def _gallery_text(found: Gallery) -> str:
    if not found.mistakes:
        return "There are no mistakes."
    text = (
        f"The {count(len(found.thumbnails), 'mistake')} with the highest probability of the predicted class, of "
        f"{found.mistakes:,}: true class, → predicted class, probability."
    )
    return text + (
        f" Skipped, because they cannot be read: {count(found.unreadable, 'image')}." if found.unreadable else ""
    )


def _comparison_answers(runs: Mapping[str, RunFiles], differences: comparison.Differences) -> list[Answer]:
    """The best run overall and on few-shot classes, and whether further runs differ from the first."""
    found = []
    for shot, question in (("overall", "Which run is most accurate?"), ("few", "And on few-shot classes?")):
        values = {name: run.analysis["accuracy"][shot] for name, run in runs.items()}
        known = {name: value for name, value in values.items() if value is not None}
        if known:
            best = max(known, key=lambda name: known[name]["estimate"])
            text = "; ".join(f"{clip(name)} {with_interval(value)}" for name, value in known.items())
            found.append(Answer(question, f"{clip(best)}: {percent(known[best]['estimate'])}", f"{text}."))
    intervals = {name: interval for name, row in differences.items() if (interval := row["overall"]) is not None}
    if intervals:
        text = "; ".join(f"{clip(name)} {with_interval(interval, points)}" for name, interval in intervals.items())
        clear = [name for name, interval in intervals.items() if not interval["low"] <= 0 <= interval["high"]]
        verdict = f"{len(clear)} of {count(len(intervals), 'further run')} differ clearly from the first"
        text = f"Difference to {next(iter(runs))} on the same images: {text}."
        found.append(Answer("Is the difference more than chance?", verdict, text))
    return found
