"""Losses for long-tailed classification: A-GCL, the full LPT objective and logit-adjusted cross-entropy.

`agcl_loss` and `AGCLLoss` work with the logits of any cosine classifier. `LPTLoss` adds the match term of the prompt
pool and weights the two halves of a dual-sampled batch. `logit_adjusted_loss` and `LogitAdjustedLoss` work with the
logits of any classifier.

Source: Dong, Zhou, Yan, Zuo, "LPT: Long-tailed Prompt Tuning for Image Classification", ICLR 2023, arXiv 2210.01033.
"""

from lpt_peft.losses.agcl import AGCLLoss, agcl_loss
from lpt_peft.losses.logit_adjusted import LogitAdjustedLoss, logit_adjusted_loss
from lpt_peft.losses.lpt import LPTLoss, MatchedOutput
from lpt_peft.losses.query_regularizer import query_regularizer

__all__ = [
    "AGCLLoss",
    "LPTLoss",
    "LogitAdjustedLoss",
    "MatchedOutput",
    "agcl_loss",
    "logit_adjusted_loss",
    "query_regularizer",
]
