"""Draws docs/images/method.png, the picture of the method in the README: `python docs/images/method.py`.

Needs the extra `lpt_peft[demo]` (matplotlib). The colours are those of Okabe and Ito, which colour-blind readers can
distinguish; every coloured box also has a label.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

TEXT = "#111111"
FROZEN, SHARED, GROUP, HEAD, UNUSED = "#E3E6EA", "#FFD58A", "#A9D3F0", "#A8DFC9", "#FFFFFF"
EDGES = {FROZEN: "#5F6B78", SHARED: "#B36F00", GROUP: "#0072B2", HEAD: "#007A5E", UNUSED: "#0072B2"}


def box(axes: Any, corner: tuple[float, float], size: tuple[float, float], label: str, colour: str) -> None:
    """Draw a rounded box with a centred label; `corner` is the lower left corner."""
    (x, y), (width, height) = corner, size
    style = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.08", lw=1.4)
    style.set(facecolor=colour, edgecolor=EDGES[colour])
    axes.add_patch(style)
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", color=TEXT, fontsize=12)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str = TEXT) -> None:
    """Draw an arrow from start to end."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def draw() -> Any:
    """The figure: a long tail of classes, the frozen ViT in the middle, the trained parts in colour."""
    figure, axes = plt.subplots(figsize=(10.6, 4.5))
    axes.set(xlim=(0, 10.6), ylim=(0, 4.5))
    axes.axis("off")

    def note(x: float, y: float, label: str, **style: Any) -> None:
        axes.text(x, y, label, **({"ha": "center", "va": "center", "color": TEXT, "fontsize": 11} | style))

    # The long tail.
    counts = [1.0, 0.62, 0.38, 0.24, 0.15, 0.1, 0.07, 0.05]
    for place, count in enumerate(counts):
        axes.bar(0.22 + 0.17 * place, count, 0.13, bottom=2.42, color=EDGES[FROZEN])
    note(0.82, 2.2, "images per class")
    arrow(axes, (1.55, 2.75), (2.0, 2.75))

    # The frozen ViT.
    box(axes, (2.0, 2.35), (1.1, 0.8), "embed", FROZEN)
    arrow(axes, (3.1, 2.75), (3.45, 2.75))
    box(axes, (3.45, 2.35), (2.0, 0.8), "blocks 1 to K", FROZEN)
    arrow(axes, (5.45, 2.75), (5.9, 2.75))
    box(axes, (5.9, 2.35), (2.0, 0.8), "blocks K+1 to L", FROZEN)
    arrow(axes, (7.9, 2.75), (8.25, 2.75))
    box(axes, (8.25, 2.35), (1.2, 0.8), "cosine\nhead", HEAD)
    arrow(axes, (9.45, 2.75), (9.8, 2.75))
    note(10.2, 2.75, "class")

    # Phase 1 above, phase 2 below.
    box(axes, (3.45, 3.75), (4.45, 0.5), "shared prompt, for all images", SHARED)
    arrow(axes, (4.45, 3.75), (4.45, 3.15), EDGES[SHARED])
    arrow(axes, (6.9, 3.75), (6.9, 3.15), EDGES[SHARED])
    note(3.3, 4.0, "phase 1", ha="right", weight="bold", fontsize=12)
    for place in range(6):
        chosen = place in (1, 4)
        box(axes, (3.45 + 0.75 * place, 0.85), (0.62, 0.5), f"{place + 1}", GROUP if chosen else UNUSED)
        if chosen:
            arrow(axes, (3.76 + 0.75 * place, 1.35), (6.7 + 0.2 * (place == 4), 2.35), EDGES[GROUP])
    note(3.45, 0.5, "pool of group prompts: each image uses those with the most similar keys", ha="left")
    note(3.3, 1.1, "phase 2", ha="right", weight="bold", fontsize=12)
    note(0.22, 0.02, "Grey is the frozen ViT. Colours are trained: about 1 % of the parameters.", ha="left")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=150, bbox_inches="tight", facecolor="white")
