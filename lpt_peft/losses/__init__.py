"""Losses of Long-tailed Prompt Tuning: A-GCL, and the whole objective on a dual-sampled batch.

`agcl_loss` / `AGCLLoss` stand alone: they take the logits of any cosine classifier, labels and class counts.
`LPTLoss` adds the match term of the prompt pool and the weights of the two sampling branches.

Not here: what makes the logits (`lpt_peft.heads`), the batches (`lpt_peft.samplers`) and the similarities
(`lpt_peft.prompts`).

Source: Dong, Zhou, Yan, Zuo, "LPT: Long-tailed Prompt Tuning for Image Classification", ICLR 2023, arXiv 2210.01033.
"""

from lpt_peft.losses.agcl import AGCLLoss, agcl_loss
from lpt_peft.losses.lpt import LPTLoss, MatchedOutput

__all__ = ["AGCLLoss", "LPTLoss", "MatchedOutput", "agcl_loss"]
