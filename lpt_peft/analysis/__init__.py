"""Functions on features, logits and predictions that show what a model has learned and where it fails.

They take tensors and labels, never a model, work in chunks, and compute in float64 where sums are long. Their results
are named tuples; a mean over nothing is None. Not here: features and logits of a run (`lpt_peft.recipe.analyse`).
"""

from lpt_peft.analysis.bootstrap import Interval, bootstrap_accuracy, bootstrap_difference
from lpt_peft.analysis.calibration import Reliability, Temperature, fit_temperature, reliability, reliability_by_shots
from lpt_peft.analysis.confusion import Confusion, WeakClasses, confused_pairs, weak_classes
from lpt_peft.analysis.matching import Matching, group_histogram, matching_statistics
from lpt_peft.analysis.neighbours import knn_predict
from lpt_peft.analysis.pool_value import Accuracy, PoolValue, accuracy_of, pool_value, predicted_classes
from lpt_peft.analysis.projection import Discriminant, TwoSets, linear_discriminant, two_sets
from lpt_peft.analysis.proportion import wilson_interval
from lpt_peft.analysis.separability import Separability, separability
from lpt_peft.analysis.shift import ClassMatch, Shift, accuracy_shift, add_noise, blur, match_classes

__all__ = [
    "Accuracy",
    "ClassMatch",
    "Confusion",
    "Discriminant",
    "Interval",
    "Matching",
    "PoolValue",
    "Reliability",
    "Separability",
    "Shift",
    "Temperature",
    "TwoSets",
    "WeakClasses",
    "accuracy_of",
    "accuracy_shift",
    "add_noise",
    "blur",
    "bootstrap_accuracy",
    "bootstrap_difference",
    "confused_pairs",
    "fit_temperature",
    "group_histogram",
    "knn_predict",
    "linear_discriminant",
    "match_classes",
    "matching_statistics",
    "pool_value",
    "predicted_classes",
    "reliability",
    "reliability_by_shots",
    "separability",
    "two_sets",
    "weak_classes",
    "wilson_interval",
]
