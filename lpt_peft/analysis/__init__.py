"""Analysis of predictions and features: bootstrap intervals and paired differences.

Pure functions on tensors; they need neither the adapter nor a backbone.
"""

from lpt_peft.analysis.bootstrap import Interval, bootstrap_accuracy, bootstrap_difference

__all__ = ["Interval", "bootstrap_accuracy", "bootstrap_difference"]
