"""Long-tailed Prompt Tuning for frozen Vision Transformers.

Public names are imported on first use: `import lpt_peft` alone does not import torch.
"""

from typing import TYPE_CHECKING

from lpt_peft._lazy import import_on_first_use
from lpt_peft._version import __version__

if TYPE_CHECKING:
    from lpt_peft.adapter import LongTailPromptAdapter
    from lpt_peft.bank import PromptBank
    from lpt_peft.config import PromptConfig
    from lpt_peft.errors import LPTError
    from lpt_peft.heads import CosineClassifier, cosine_logits
    from lpt_peft.inference import Classifier
    from lpt_peft.losses import AGCLLoss, LogitAdjustedLoss, LPTLoss, agcl_loss, logit_adjusted_loss
    from lpt_peft.metrics import SHOT_RULES, ShotMetrics, ShotResult, ShotRule, shot_metrics
    from lpt_peft.output import AdapterOutput
    from lpt_peft.prompts import PoolMatch, PromptPool, SharedPrompt, decay_selected
    from lpt_peft.samplers import ClassBalancedSampler, DualSampler
    from lpt_peft.vit_classifier import ViTClassifier

__all__ = [
    "SHOT_RULES",
    "AGCLLoss",
    "AdapterOutput",
    "ClassBalancedSampler",
    "Classifier",
    "CosineClassifier",
    "DualSampler",
    "LPTError",
    "LPTLoss",
    "LogitAdjustedLoss",
    "LongTailPromptAdapter",
    "PoolMatch",
    "PromptBank",
    "PromptConfig",
    "PromptPool",
    "SharedPrompt",
    "ShotMetrics",
    "ShotResult",
    "ShotRule",
    "ViTClassifier",
    "__version__",
    "agcl_loss",
    "cosine_logits",
    "decay_selected",
    "logit_adjusted_loss",
    "shot_metrics",
]

import_on_first_use(  # must match the imports above; a test compares them
    __name__,
    {
        "adapter": ["LongTailPromptAdapter"],
        "bank": ["PromptBank"],
        "config": ["PromptConfig"],
        "errors": ["LPTError"],
        "heads": ["CosineClassifier", "cosine_logits"],
        "inference": ["Classifier"],
        "losses": ["AGCLLoss", "LogitAdjustedLoss", "LPTLoss", "agcl_loss", "logit_adjusted_loss"],
        "metrics": ["SHOT_RULES", "ShotMetrics", "ShotResult", "ShotRule", "shot_metrics"],
        "output": ["AdapterOutput"],
        "prompts": ["PoolMatch", "PromptPool", "SharedPrompt", "decay_selected"],
        "samplers": ["ClassBalancedSampler", "DualSampler"],
        "vit_classifier": ["ViTClassifier"],
    },
)
