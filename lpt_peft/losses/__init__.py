"""Losses for long-tailed classification, each as a pure function and as a module.

`agcl_loss` and `AGCLLoss` (A-GCL) and `ldam_loss` and `LDAMLoss` work with the logits of any cosine classifier.
`LPTLoss` adds the match term of the prompt pool and weights the two halves of a dual-sampled batch. Logit-adjusted
cross-entropy, balanced softmax, focal loss and the class-balanced loss work with the logits of any classifier.

Source of A-GCL and `LPTLoss`: Dong, Zhou, Yan, Zuo, "LPT: Long-tailed Prompt Tuning for Image Classification",
ICLR 2023, arXiv 2210.01033. The other losses name their sources.
"""

from lpt_peft.losses.agcl import AGCLLoss, agcl_loss
from lpt_peft.losses.balanced_softmax import BalancedSoftmaxLoss, balanced_softmax_loss
from lpt_peft.losses.class_balanced import (
    ClassBalancedLoss,
    class_balanced_loss,
    class_balanced_weights,
    dual_sampling_counts,
)
from lpt_peft.losses.focal import FocalLoss, focal_loss
from lpt_peft.losses.ldam import LDAMLoss, ldam_loss
from lpt_peft.losses.logit_adjusted import LogitAdjustedLoss, adjust_logits, logit_adjusted_loss
from lpt_peft.losses.lpt import LPTLoss, MatchedOutput
from lpt_peft.losses.query_regularizer import query_regularizer

__all__ = [
    "AGCLLoss",
    "BalancedSoftmaxLoss",
    "ClassBalancedLoss",
    "FocalLoss",
    "LDAMLoss",
    "LPTLoss",
    "LogitAdjustedLoss",
    "MatchedOutput",
    "adjust_logits",
    "agcl_loss",
    "balanced_softmax_loss",
    "class_balanced_loss",
    "class_balanced_weights",
    "dual_sampling_counts",
    "focal_loss",
    "ldam_loss",
    "logit_adjusted_loss",
    "query_regularizer",
]
