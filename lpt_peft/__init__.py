"""Long-tailed Prompt Tuning for frozen Vision Transformers."""

from lpt_peft._version import __version__
from lpt_peft.adapter import LongTailPromptAdapter
from lpt_peft.config import PromptConfig
from lpt_peft.errors import LPTError
from lpt_peft.heads import CosineClassifier, cosine_logits
from lpt_peft.losses import AGCLLoss, LPTLoss, agcl_loss
from lpt_peft.metrics import SHOT_RULES, ShotMetrics, ShotResult, ShotRule, shot_metrics
from lpt_peft.output import AdapterOutput
from lpt_peft.prompts import PoolMatch, PromptPool, SharedPrompt, decay_selected
from lpt_peft.samplers import ClassBalancedSampler, DualSampler

__all__ = [
    "SHOT_RULES",
    "AGCLLoss",
    "AdapterOutput",
    "ClassBalancedSampler",
    "CosineClassifier",
    "DualSampler",
    "LPTError",
    "LPTLoss",
    "LongTailPromptAdapter",
    "PoolMatch",
    "PromptConfig",
    "PromptPool",
    "SharedPrompt",
    "ShotMetrics",
    "ShotResult",
    "ShotRule",
    "__version__",
    "agcl_loss",
    "cosine_logits",
    "decay_selected",
    "shot_metrics",
]
