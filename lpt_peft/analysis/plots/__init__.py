"""Pictures of an analysis, drawn from its JSON; they need the extra `lpt_peft[analysis]`.

Every function but `plot_class_rows` takes the result of `lpt_peft.recipe.analyse.analyse`. All return a matplotlib
figure 800 px wide at 100 dots per inch. Colours are those of Okabe and Ito; the heat map uses cividis.
"""

from collections.abc import Mapping
from typing import Any

from lpt_peft.analysis.plots.classes import plot_class_rows, plot_classes, plot_confusion
from lpt_peft.analysis.plots.features import plot_features, plot_pretraining, plot_projection
from lpt_peft.analysis.plots.groups import plot_matching, plot_pool
from lpt_peft.analysis.plots.reliability import plot_calibration, plot_shift
from lpt_peft.analysis.plots.style import png

__all__ = [
    "figures",
    "plot_calibration",
    "plot_class_rows",
    "plot_classes",
    "plot_confusion",
    "plot_features",
    "plot_matching",
    "plot_pool",
    "plot_pretraining",
    "plot_projection",
    "plot_shift",
    "png",
]

_PLOTS = {
    "classes": plot_classes,
    "features": plot_features,
    "projection": plot_projection,
    "pretraining": plot_pretraining,
    "matching": plot_matching,
    "pool": plot_pool,
    "calibration": plot_calibration,
    "confused_pairs": plot_confusion,
    "shift": plot_shift,
}


def figures(analysis: Mapping[str, Any]) -> dict[str, Any]:
    """Draw every section that the analysis has; empty sections are left out.

    Returns:
        Figures by name of the section, in the order of a report.
    """
    return {name: plot(analysis) for name, plot in _PLOTS.items() if analysis.get(name)}
