"""The table of a comparison, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable

from lpt_peft._text import number
from lpt_peft.metrics.result import SHOTS
from lpt_peft.recipe.compare.results import LEVEL, Comparison, Figure, Row


def table(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows: accuracies in percent, mean ± standard deviation over seeds, interval, cost."""
    baseline = comparison.baseline
    level = f"{100 * LEVEL:g} %"
    difference = () if baseline is None else (f"minus {baseline}", f"{level} interval")
    header = (
        "",
        "overall",
        f"{level} interval",
        *SHOTS[1:],
        *difference,
        "seeds",
        "trained",
        "file",
        "seconds",
        "memory",
    )
    return header, [_cells(row, comparison) for row in comparison.rows]


def markdown(comparison: Comparison) -> str:
    """Return the table and its caption as Markdown."""
    header, rows = table(comparison)
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "---|" + "---:|" * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join([*lines, "", caption(comparison), ""])


def caption(comparison: Comparison) -> str:
    """Describe what the figures are, in a few sentences."""
    images, seeds = number(comparison.images, "image"), number(len(comparison.seeds), "seed")
    text = (
        f"Balanced accuracy in % on the {comparison.split} split ({images}), mean ± standard deviation over {seeds}. "
        f"{comparison.rule}. Intervals: class-stratified bootstrap over images, {comparison.draws:,} draws"
    )
    paired = "" if comparison.baseline is None else "; differences are paired by image and seed"
    return f"{text}{paired}. Seconds and memory are those of a run."


def _cells(row: Row, comparison: Comparison) -> tuple[str, ...]:
    overall, *shots = (row.figures[shot] for shot in SHOTS)
    difference = None if overall is None else overall.difference
    paired: tuple[str, ...] = ()
    if comparison.baseline is not None:
        paired = ("-", "-") if difference is None else (_signed(difference.estimate), _range(difference[1:], _signed))
    return (
        row.name,
        _mean(overall),
        "-" if overall is None else _range(overall.interval, _percent),
        *map(_mean, shots),
        *paired,
        f"{len(row.runs)}",
        "-" if row.trained_parameters is None else f"{row.trained_parameters:,}",
        _bytes(row.file_bytes),
        "-" if row.seconds is None else f"{row.seconds:.0f}",
        _bytes(row.peak_memory_bytes),
    )


def _mean(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return _percent(figure.mean) + ("" if figure.spread is None else f" ± {_percent(figure.spread)}")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def _range(bounds: tuple[float, ...], text: Callable[[float], str]) -> str:
    return " to ".join(map(text, bounds))


def _bytes(size: int | None) -> str:
    if size is None:
        return "-"
    power, unit = (30, "GiB") if size >= 2**30 else (20, "MiB") if size >= 2**20 else (10, "KiB")
    value = size / 2**power
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
