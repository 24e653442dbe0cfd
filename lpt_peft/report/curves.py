"""Pictures of training curves, and of the accuracies of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lpt_peft.analysis.plots.style import BLACK, PALETTE, SHOTS, legend, new_figure, short, tidy

_STYLES = ("-", "--", "-.", ":")
_GREY = "#888888"


def plot_history(history: Sequence[Mapping[str, Any]]) -> Any:
    """Loss and validation accuracy over the epochs of all phases.

    Args:
        history: Records of history.json, at least one.
    """
    validated = any(_validation(record) for record in history)
    figure = new_figure(4.6 if validated else 2.8)
    panels = figure.subplots(2 if validated else 1, 1, sharex=True, squeeze=False)[:, 0]
    panels[0].plot(range(1, len(history) + 1), [record["loss"] for record in history], color=BLACK, linewidth=1.6)
    tidy(panels[0], title=f"Training loss{_phase_title(history)}", x="" if validated else "epoch")
    if validated:
        for shot, colour in {"overall": BLACK, **SHOTS}.items():
            epochs, values = _accuracies(history, shot)
            if epochs:
                panels[1].plot(epochs, values, color=colour, marker="o", markersize=3, linewidth=1.4, label=shot)
        tidy(panels[1], title="Validation accuracy, mean over classes", x="epoch", y="%")
        legend(panels[1], loc="lower right", ncols=4)
    for axes in panels:
        for start, _ in _phases(history):
            if start:
                axes.axvline(start + 0.5, color=_GREY, linewidth=1, linestyle="--")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_histories(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Training losses and validation accuracies of several runs.

    Args:
        histories: Records by name of the run, at least one run with a record.
    """
    validated = any(_validation(record) for history in histories.values() for record in history)
    figure = new_figure(5.0 if validated else 3.2)
    panels = figure.subplots(2 if validated else 1, 1, sharex=True, squeeze=False)[:, 0]
    for number, (name, history) in enumerate(histories.items()):
        style: dict[str, Any] = {"linewidth": 1.6, "label": short(name), "color": PALETTE[number % len(PALETTE)]}
        style["linestyle"] = _STYLES[number // len(PALETTE) % len(_STYLES)]
        panels[0].plot(range(1, len(history) + 1), [record["loss"] for record in history], **style)
        if validated:
            panels[1].plot(*_accuracies(history, "overall"), marker="o", markersize=3, **style)
    tidy(panels[0], title="Training loss: comparable between runs with the same loss function", x="")
    if validated:
        tidy(panels[1], title="Validation accuracy, mean over classes", y="%")
    panels[-1].set_xlabel("epoch, over all phases", fontsize=11)
    for axes in panels:
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    return figure


def plot_runs(accuracies: Mapping[str, Mapping[str, Any]]) -> Any:
    """Accuracies and intervals of several runs, overall and by shot group.

    Args:
        accuracies: Section "accuracy" of the analyses, by name of the run.
    """
    figure = new_figure(1.6 + 0.5 * len(accuracies))
    shots = {"overall": BLACK, **SHOTS}
    panels = figure.subplots(1, len(shots), sharey=True)
    for axes, (shot, colour) in zip(panels, shots.items(), strict=True):
        for place, accuracy in enumerate(accuracies.values()):
            if (interval := accuracy[shot]) is not None:
                axes.plot([100 * interval["low"], 100 * interval["high"]], [place, place], color=colour, linewidth=2)
                axes.plot([100 * interval["estimate"]], [place], "o", color=colour, markersize=7)
        axes.set_yticks(range(len(accuracies)), [short(name, 20) for name in accuracies])
        axes.set_ylim(len(accuracies) - 0.5, -0.5)
        tidy(axes, title=shot, x="%")
    return figure


def _validation(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record.get("validation") or {}


def _accuracies(history: Sequence[Mapping[str, Any]], shot: str) -> tuple[list[int], list[float]]:
    """Epochs with a validation, counted from 1 over all phases, and accuracies in percent."""
    rows = [(epoch, _validation(record).get(shot)) for epoch, record in enumerate(history, 1)]
    return [epoch for epoch, value in rows if value is not None], [100 * v for _, v in rows if v is not None]


def _phases(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """First record and name of each phase."""
    names = [str(record["phase"]) for record in history]
    return [(start, name) for start, name in enumerate(names) if not start or names[start - 1] != name]


def _phase_title(history: Sequence[Mapping[str, Any]]) -> str:
    phases = _phases(history)
    ends = [start for start, _ in phases[1:]] + [len(history)]
    texts = [f"{phase} (epochs {start + 1} to {end})" for (start, phase), end in zip(phases, ends, strict=True)]
    return f": {', then '.join(texts)}"
