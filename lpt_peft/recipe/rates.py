"""Default learning rates of methods, and the rates of a phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lpt_peft.recipe.method_settings import MethodName
    from lpt_peft.recipe.settings import PhaseSettings, TrainSettings

DEFAULT_RATES: Mapping[str, Mapping[MethodName, float]] = {
    "adamw": {"lpt": 0.01, "vpt_deep": 0.005, "vpt_shallow": 0.005, "linear_probe": 0.005, "full": 0.0001},
    "sgd": {"lpt": 0.02, "vpt_deep": 0.02, "vpt_shallow": 0.02, "linear_probe": 0.6, "full": 0.002},
}
"""Learning rate by optimizer and method; those of SGD are for 256 images in each half of a batch, see `rate_scale`.

Those of prompts with SGD are the paper's (LPT, Dong et al., ICLR 2023, arXiv 2210.01033). All others were the best of
their method and optimizer on validation images of Emoji-LT, see "Tuning" in docs/results.md.
"""
FULL_HEAD_FACTOR = 10.0
"""Rate of a new head relative to that of a ViT that is trained with it, as in the tuning on Emoji-LT."""
POOL_FACTOR = 3.0
"""Rate of the group prompts relative to that of the shared prompt: the row "joint_fast_groups" of docs/results.md."""


class LearningRates(NamedTuple):
    """Learning rates of a phase, before `rate_scale`."""

    base: float
    """Of the shared prompt, the keys, and the weights of the ViT."""
    head: float
    pool: float
    """Of the group prompts."""


def learning_rates(phase: PhaseSettings, settings: TrainSettings) -> LearningRates:
    """Return the rates of a phase; a rate that is None takes its default.

    Args:
        phase: Settings of the phase.
        settings: `method` and `optimizer` are used.

    Example:
        >>> from lpt_peft.recipe import PhaseSettings, TrainSettings
        >>> learning_rates(PhaseSettings(), TrainSettings(method="full"))
        LearningRates(base=0.0001, head=0.001, pool=0.0003)
    """
    base, head, pool = phase.learning_rate, phase.head_learning_rate, phase.pool_learning_rate
    if base is None:
        base = DEFAULT_RATES[settings.optimizer][settings.method]
    if head is None:
        head = _times(base, FULL_HEAD_FACTOR) if settings.method == "full" else base
    if settings.method == "linear_probe":  # nothing but the head is trained
        base = head
    return LearningRates(base, head, _times(base, POOL_FACTOR) if pool is None else pool)


def rate_scale(settings: TrainSettings) -> float:
    """Return the factor of all learning rates that depends on the batch: `B / 256` for SGD, 1 for AdamW.

    B is the number of images in each half of a batch. The linear rule is the paper's. AdamW divides each gradient by
    its size, so the step for a rate hardly depends on the batch: the rate that won on Emoji-LT, with B = 128, also won
    on the digits, with B = 8.
    """
    return settings.half_batch / 256 if settings.optimizer == "sgd" else 1.0


def base_rate_field(settings: TrainSettings) -> str:
    """Return the field of `PhaseSettings` that sets the base rate; a linear probe may have a rate of the head."""
    is_head = settings.method == "linear_probe" and settings.shared.head_learning_rate is not None
    return "head_learning_rate" if is_head else "learning_rate"


def with_rates(phase: PhaseSettings, settings: TrainSettings) -> PhaseSettings:
    """Return a copy of a phase whose learning rates are numbers, see `learning_rates`."""
    rates = learning_rates(phase, settings)
    return replace(phase, learning_rate=rates.base, head_learning_rate=rates.head, pool_learning_rate=rates.pool)


def _times(rate: float, factor: float) -> float:
    """The product without the rounding of binary fractions: 3 times 0.02 is 0.06, as in settings written by hand."""
    return float(f"{rate * factor:.12g}")
