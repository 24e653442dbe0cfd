"""Published training settings by name, with their source and the accuracy it reports.

A preset sets every value that its source gives, also where it equals the default of `TrainSettings`. All others are
those defaults, such as the length of the warm-up, which the paper only calls short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from lpt_peft.errors import ConfigError
from lpt_peft.recipe.settings import PhaseSettings, TrainSettings


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings and their source.

    The command sets all of them. In Python, the query belongs to the adapter:

        known = preset("paper")
        adapter = LongTailPromptAdapter.wrap(vit, num_classes, query=known.query)
        train(adapter, data, labels, known.settings)
    """

    settings: TrainSettings
    query: Literal["final", "block_k"] = "final"
    """How groups are selected, for `LongTailPromptAdapter.wrap`."""
    shot_rule: str
    """A name of `lpt_peft.metrics.SHOT_RULES`."""
    crop_pct: float = 224 / 256
    """Of the evaluation: resize the shorter side to 256 and crop the central 224."""
    source: str
    expected: str
    """Accuracy in % that the source reports: a target, not a guarantee."""

    def __str__(self) -> str:
        return f"Source: {self.source} Expected accuracy in %: {self.expected}."


_PHASE = PhaseSettings(
    epochs=40,
    learning_rate=0.02,
    pool_learning_rate=0.02,
    weight_decay=0.01,
    momentum=0.9,
)
_PAPER = Preset(
    settings=TrainSettings(
        method="lpt",
        shared=replace(_PHASE, pool_learning_rate=None),  # has no groups
        group=_PHASE,
        phases="decoupled",
        sampling="dual",
        samples_per_class=4,
        loss="lpt",
        optimizer="sgd",
        eta=0.5,
        init_prompts="random",
        init_head="random",
        init_keys="random",
        init_groups="random",
    ),
    shot_rule="lpt",
    source=(
        "LPT, Dong et al., ICLR 2023, arXiv 2210.01033: ViT-B/16 pretrained on ImageNet-21k, 224 px; learning rate "
        "0.02 * B / 256 for B images in each half of a batch. The 40 + 40 epochs are quoted from memory of the paper; "
        "the published program trains 90 epochs in phase 2."
    ),
    expected=(
        "Places-LT 50.07 (many 49.27, medium 52.31, few 46.88; released checkpoint); CIFAR-100-LT 89.1, 90.0 and 91.0 "
        "at imbalance 100, 50 and 10"
    ),
)
_LONG = replace(_PHASE, epochs=80)

PRESETS: Mapping[str, Preset] = {
    "paper": _PAPER,
    "inat2018": replace(
        _PAPER,
        settings=replace(_PAPER.settings, shared=replace(_PAPER.settings.shared, epochs=80), group=_LONG),
        source=_PAPER.source.replace("40 + 40", "80 + 80"),
        expected="iNaturalist 2018 76.1 (few 79.3)",
    ),
}


def preset(name: str) -> Preset:
    """Return the preset of this name.

    Raises:
        ConfigError: The name is unknown.

    Example:
        >>> preset("inat2018").settings.group.epochs
        80
    """
    if name not in PRESETS:
        raise ConfigError(
            f"There is no preset {name!r}; the presets are {', '.join(PRESETS)}. Places-LT and CIFAR-LT use paper."
        )
    return PRESETS[name]
