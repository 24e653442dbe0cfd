"""Methods by name, and which settings each of them uses.

Not here: what a method does with a model (`methods.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Literal

from lpt_peft.errors import ConfigError

if TYPE_CHECKING:
    from lpt_peft.recipe.settings import TrainSettings

MethodName = Literal["lpt", "vpt_deep", "vpt_shallow", "linear_probe", "full"]
METHODS: tuple[MethodName, ...] = ("lpt", "vpt_deep", "vpt_shallow", "linear_probe", "full")

MODEL_METHODS: tuple[MethodName, ...] = ("linear_probe", "full")
"""Methods without prompts."""

GROUP_FIELDS = frozenset({"group", "phases", "init_keys", "init_groups", "decay", "query_regularizer"})
"""Fields of `TrainSettings` that concern groups, which only "lpt" has."""
PROMPT_FIELDS = GROUP_FIELDS | {"init_prompts"}
"""Fields that concern prompts."""


def check_method(settings: TrainSettings) -> None:
    """Check that a method and the other settings do not contradict each other.

    Raises:
        ConfigError: They do, or the method is unknown.
    """
    method = settings.method
    if method not in METHODS:
        known = ", ".join(f'"{name}"' for name in METHODS)
        raise ConfigError(f"TrainSettings: method={method!r} must be one of {known}.")
    if method != "lpt" and settings.phases != "decoupled":
        raise ConfigError(
            f'method="{method}" has a single phase, so phases="{settings.phases}" has no meaning: leave it out, or use '
            'method="lpt".'
        )
    if method == "full" and settings.backbone_dtype != "float32":
        raise ConfigError(
            f'method="full" trains the weights of the ViT, which backbone_dtype="{settings.backbone_dtype}" would '
            'round in every step: leave it at "float32", and use mixed_precision="bf16" for speed.'
        )


def unused_fields(method: MethodName) -> frozenset[str]:
    """Names of the fields of `TrainSettings` that a method does not use."""
    if method == "lpt":
        return frozenset()
    return GROUP_FIELDS if method.startswith("vpt_") else PROMPT_FIELDS


def unused_settings(settings: TrainSettings) -> Iterator[str]:
    """Names of the fields that the method does not use and that differ from their defaults."""
    unused = unused_fields(settings.method)
    for field in fields(settings):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in unused and getattr(settings, field.name) != default:
            yield field.name
