"""Colours, sizes and files of the pictures; matplotlib's global state is not changed."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np

from lpt_peft._text import printable
from lpt_peft.errors import MissingExtraError

BLACK, ORANGE, SKY, GREEN, YELLOW = "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, BLACK, YELLOW)
"""Colours that people with any colour vision can distinguish: Okabe & Ito, "Color Universal Design", 2008."""
SHOTS = {"many": BLUE, "medium": ORANGE, "few": VERMILION}
STATES = {
    "plain": ("plain ViT", SKY),
    "shared": ("shared prompt", GREEN),
    "group": ("with groups", VERMILION),
    "tuned": ("tuned ViT", PURPLE),
}
_DPI = 150
_FONT = 11


def new_figure(height: float, width: float = 8.0) -> Any:
    """A figure for a page 800 px wide, sizes in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context  # noqa: PLC0415 - an optional extra, slow to import
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError('The pictures need matplotlib: pip install "lpt_peft[analysis]".') from error
    with rc_context({"figure.facecolor": "white", "savefig.facecolor": "white"}):
        figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Any, *, title: str, x: str = "", y: str = "") -> None:
    """Title and labels in the size of the text, light grid lines, no frame at the top and right."""
    axes.set_title(title, fontsize=_FONT + 1, loc="left")
    axes.set_xlabel(x, fontsize=_FONT)
    axes.set_ylabel(y, fontsize=_FONT)
    axes.tick_params(labelsize=_FONT - 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color="#DDDDDD", linewidth=0.7)


def legend(axes: Any, **options: Any) -> None:
    """A legend in the size of the text."""
    axes.legend(fontsize=_FONT - 1, framealpha=0.9, edgecolor="#CCCCCC", **options)


def annotate_bars(axes: Any, bars: Any, texts: Sequence[str]) -> None:
    """Write a text at the end of every bar."""
    axes.bar_label(bars, texts, padding=3, fontsize=_FONT - 1)


def short(name: str, most: int = 24) -> str:
    """A class name of limited length; "$" would start a formula."""
    text = printable(name, 1000).replace("$", r"\$")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def numbers(values: Sequence[float | None]) -> np.ndarray:
    """Numbers of a JSON list, NaN for null."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def png(figure: Any) -> bytes:
    """The bytes of a PNG file."""
    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
