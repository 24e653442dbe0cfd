"""Accuracy of a long-tailed classifier: many/medium/few-shot groups, means over classes, calibration.

For any evaluation loop: logits, labels and the classes' training counts go in; a JSON-ready result comes out, and it
always states its shot rule, because codebases differ in it. `shot_metrics` is the pure function, `ShotMetrics` its
accumulating twin. Not here: losses, plots, a confusion matrix (530 MB on iNaturalist; these counters are O(C)).

A class never seen in training (count 0) is few-shot. A class without a test image is listed as absent and left out of
every mean; a mean over nothing is None, never 0 or NaN. Accuracies are fractions from 0 to 1.
"""

from lpt_peft.metrics.accumulator import ShotMetrics
from lpt_peft.metrics.result import Average, ShotResult, shot_metrics
from lpt_peft.metrics.rules import SHOT_RULES, ShotRule, shot_groups

__all__ = ["SHOT_RULES", "Average", "ShotMetrics", "ShotResult", "ShotRule", "shot_groups", "shot_metrics"]
