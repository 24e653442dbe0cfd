"""Long-tailed classification metrics: many-, medium- and few-shot accuracy, class means and calibration.

The metrics work in any evaluation loop. They take logits, labels and the training counts of the classes, and give a
JSON-ready result that always states its shot rule, because codebases differ in it. `shot_metrics` is a pure function of
counters; `ShotMetrics` accumulates the counters over batches. There is no confusion matrix: it would take 530 MB on
iNaturalist, whereas these counters are O(C).

A class without training images (count 0) is few-shot. A class without test images is listed as absent and excluded from
every mean. A mean over nothing is None, never 0 or NaN. Accuracies are fractions from 0 to 1.
"""

from lpt_peft.metrics.accumulator import ShotMetrics
from lpt_peft.metrics.result import Average, ShotResult, shot_metrics
from lpt_peft.metrics.shot_rules import SHOT_RULES, ShotRule, shot_groups

__all__ = ["SHOT_RULES", "Average", "ShotMetrics", "ShotResult", "ShotRule", "shot_groups", "shot_metrics"]
