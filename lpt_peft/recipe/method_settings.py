"""Methods by name, and which settings each of them uses.

Not here: what a method does with a model (`methods.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Literal

from lpt_peft.errors import ConfigError

if TYPE_CHECKING:
    from lpt_peft.recipe.settings import PhaseSettings, TrainSettings

MethodName = Literal["lpt", "vpt_deep", "vpt_shallow", "linear_probe", "full"]
METHODS: tuple[MethodName, ...] = ("lpt", "vpt_deep", "vpt_shallow", "linear_probe", "full")

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
    yield from _changed(settings, unused_fields(settings.method))


def settings_without_effect(settings: TrainSettings) -> Iterator[tuple[str, str]]:
    """Reasons, each with the names of changed settings that have no effect because of it, whatever the method.

    Not among them: settings that the method does not use (`unused_settings`).
    """
    if settings.method == "lpt":
        yield from _without_groups(settings)
    if settings.shared.pool_learning_rate is not None:
        yield "the rate of the group prompts is group.pool_learning_rate", "shared.pool_learning_rate"
    if settings.method == "linear_probe" and settings.shared.head_learning_rate is not None:
        unused = ", ".join(f"shared.{name}" for name in _changed(settings.shared, {"learning_rate"}))
        yield 'method="linear_probe" trains with the rate of the head', unused
    if settings.loss != "lpt":
        yield f'loss="{settings.loss}" does not weight the halves of a batch', ", ".join(_changed(settings, {"eta"}))
    if settings.sampling == "instance":
        yield 'sampling="instance" draws no class-balanced images', ", ".join(_changed(settings, {"samples_per_class"}))


def _without_groups(settings: TrainSettings) -> Iterator[tuple[str, str]]:
    """The part of `settings_without_effect` that depends on the phases of "lpt"."""
    changed = [f"group.{name}" for name in _changed(settings.group, {field.name for field in fields(settings.group)})]
    if settings.phases == "joint":
        unused = (name for name in changed if name != "group.pool_learning_rate")
        yield 'phase "joint" trains with the settings of shared', ", ".join(unused)
    elif settings.plan.keys() == {"shared"}:
        unused = (name for name in changed if name != "group.epochs" or settings.phases == "shared")
        yield "no phase trains groups", ", ".join([*_changed(settings, GROUP_FIELDS - {"group", "phases"}), *unused])


def _changed(settings: TrainSettings | PhaseSettings, names: Set[str]) -> Iterator[str]:
    """Those of the fields that differ from their defaults."""
    for field in fields(settings):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in names and getattr(settings, field.name) != default:
            yield field.name
