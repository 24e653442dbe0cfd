"""Rules of the training settings: names and types read from JSON, and ranges of values.

Not here: the fields (`settings.py`), and checks that need the data or the processes (`checks.py`, `parallel.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from lpt_peft.errors import ConfigError
from lpt_peft.recipe.method_settings import check_method

if TYPE_CHECKING:
    from lpt_peft.recipe.settings import PhaseSettings, TrainSettings

Loss = Literal["lpt", "agcl", "cross_entropy", "logit_adjusted", "balanced_softmax", "focal", "class_balanced", "ldam"]

_NOT_REWEIGHTED = {
    "lpt": "already trains on class-balanced images in the last epochs",
    "logit_adjusted": "already corrects for class frequencies",
    "balanced_softmax": "already corrects for class frequencies",
    "class_balanced": "has these weights from the start",
}
"""Losses that deferred reweighting would correct for class frequencies twice, with the reason."""

_BACKBONE_DTYPES = ("float32", "bfloat16", "float16")

_RATES = ("learning_rate", "head_learning_rate", "pool_learning_rate")

_NONE = type(None)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "bool": (bool,),
    "str": (str,),
    "str | None": (str, _NONE),
    "int": (int,),
    "int | None": (int, _NONE),
    "float": (int, float),
    "float | None": (int, float, _NONE),
    "Path | None": (str, _NONE),
}


def check_phase(phase: PhaseSettings) -> None:
    """Check the values of a phase's settings.

    Raises:
        ConfigError: A value is out of range.
    """
    refuse_invalid(
        phase,
        {
            "epochs": (phase.epochs >= 0, "at least 0"),
            **{name: (_optional_rate(getattr(phase, name)), "None, or above 0 and finite") for name in _RATES},
            "weight_decay": (0 <= phase.weight_decay < float("inf"), "at least 0 and finite"),
            "momentum": (0 <= phase.momentum < 1, "at least 0 and below 1"),
            "warmup": (0 <= phase.warmup <= 1, "a fraction from 0 to 1"),
        },
    )


def _optional_rate(value: float | None) -> bool:
    return value is None or 0 < value < float("inf")


def check_train(settings: TrainSettings) -> None:
    """Check the values of a run's settings, each and in combination.

    Raises:
        ConfigError: A value is out of range, or two values exclude each other.
    """
    positive, optional_positive = "at least 1", "None or at least 1"
    refuse_invalid(
        settings,
        {
            "phases": (
                settings.phases in ("joint", "decoupled", "shared"),
                '"joint", "decoupled" or "shared"',
            ),
            "batch_size": (
                settings.batch_size >= 2 and settings.batch_size % 2 == 0,
                "even and at least 2, since the two halves of a step are equal",
            ),
            "accumulate": (settings.accumulate >= 1, positive),
            "sampling": (settings.sampling in ("dual", "instance"), '"dual" or "instance"'),
            "samples_per_class": (settings.samples_per_class >= 1, positive),
            "optimizer": (settings.optimizer in ("sgd", "adamw"), '"sgd" or "adamw"'),
            "weight_noise": (0 <= settings.weight_noise < float("inf"), "at least 0 and finite"),
            "loss": (settings.loss in get_args(Loss), " or ".join(f'"{name}"' for name in get_args(Loss))),
            "tau": (0 <= settings.tau < float("inf"), "at least 0 and finite"),
            "reweight_from": (settings.reweight_from is None or settings.reweight_from >= 0, "None or at least 0"),
            "eta": (settings.eta >= 0, "at least 0"),
            "init_keys": (settings.init_keys in ("kmeans", "random"), '"kmeans" or "random"'),
            "init_prompts": (settings.init_prompts in ("random", "tokens"), '"random" or "tokens"'),
            "init_head": (settings.init_head in ("random", "class_mean"), '"random" or "class_mean"'),
            "init_groups": (
                settings.init_groups in ("shared", "random", "tokens"),
                '"shared", "random" or "tokens"',
            ),
            "query_regularizer": (0 <= settings.query_regularizer < float("inf"), "at least 0 and finite"),
            "decay": (settings.decay in ("all", "selected"), '"all" or "selected"'),
            "clip_norm": (settings.clip_norm is None or settings.clip_norm > 0, "None or above 0"),
            "mixed_precision": (
                settings.mixed_precision in (None, "no", "bf16", "fp16"),
                'None, "no", "bf16" or "fp16"',
            ),
            "backbone_dtype": (settings.backbone_dtype in _BACKBONE_DTYPES, " or ".join(map(repr, _BACKBONE_DTYPES))),
            "average": (settings.average is None or 0 < settings.average < 1, "None or above 0 and below 1"),
            "keep": (settings.keep in ("last", "best"), '"last" or "best"'),
            "patience": (settings.patience is None or settings.patience >= 1, optional_positive),
            "validate_every": (settings.validate_every >= 1, positive),
            "save_every": (settings.save_every is None or settings.save_every >= 1, optional_positive),
            "keep_checkpoints": (settings.keep_checkpoints >= 1, positive),
            "num_workers": (settings.num_workers is None or settings.num_workers >= 0, "None or at least 0"),
            "seed": (0 <= settings.seed < 2**63, "from 0 to 2**63 - 1"),
        },
    )
    check_method(settings)
    if settings.method == "lpt" and settings.phases == "joint":
        _check_joint(settings)
    if settings.loss == "lpt" and settings.sampling != "dual":
        raise ConfigError('loss="lpt" weights the two halves of a dual batch, so it needs sampling="dual".')
    if settings.tau != 1 and settings.loss != "logit_adjusted":
        raise ConfigError(f'tau={settings.tau:g} needs loss="logit_adjusted"; loss="{settings.loss}" does not use it.')
    if settings.reweight_from is not None:
        _check_reweighting(settings, settings.reweight_from)


def _check_joint(settings: TrainSettings) -> None:
    """Refuse a phase of 0 epochs, which would mean that a part is not trained."""
    if settings.group.epochs == 0:
        raise ConfigError(
            'group.epochs=0 does not leave the groups out of phases="joint", which trains them from the first step: '
            'phases="shared" trains phase 1 alone.'
        )
    if settings.shared.epochs == 0:
        raise ConfigError(
            'shared.epochs=0 trains nothing with phases="joint", a single phase with the settings of shared: '
            'phases="decoupled" trains the groups alone.'
        )


def _check_reweighting(settings: TrainSettings, start: int) -> None:
    if reason := _NOT_REWEIGHTED.get(settings.loss):
        raise ConfigError(
            f'reweight_from={start} cannot be used with loss="{settings.loss}", which {reason}: leave it out, or use '
            'loss="cross_entropy", "focal", "ldam" or "agcl".'
        )
    if start >= (longest := max((phase.epochs for phase in settings.plan.values()), default=0)):
        raise ConfigError(
            f"reweight_from={start} is never reached: epochs are counted from 0 in each phase, and the longest has "
            f"{longest}."
        )


def known(kind: type, values: Any) -> Mapping[str, Any]:
    """Validate field names and types read from JSON for a settings dataclass.

    Raises:
        ConfigError: `values` is not a mapping, a name is unknown, or a value does not have its field's type.
    """
    types = {field.name: str(field.type) for field in fields(kind)}
    hints = get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{kind.__name__} needs a mapping of names to values, not {values!r:.80}.")
    if unknown := sorted(set(values) - set(types)):
        raise ConfigError(f"{kind.__name__} has no {', '.join(unknown)}; the fields are {', '.join(sorted(types))}.")
    for name, value in values.items():
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else None
        if choices is not None and not (isinstance(value, str) and value in choices):
            raise ConfigError(f"{kind.__name__}: {name}={value!r:.80} must be one of {', '.join(choices)}.")
        allowed = _TYPES.get(types[name])
        if allowed is not None and (
            not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)
        ):
            raise ConfigError(f"{kind.__name__}: {name}={value!r:.80} must be {types[name]}.")
    return values


def refuse_invalid(settings: object, checks: Mapping[str, tuple[bool, str]]) -> None:
    """Check fields of a settings dataclass. Infinite numbers are always invalid: JSON cannot hold them.

    Args:
        settings: The dataclass.
        checks: For each field, whether it is valid, and its rule: "at least 1".

    Raises:
        ConfigError: A field is invalid.
    """
    broken = []
    for name, (valid, rule) in checks.items():
        value = getattr(settings, name)
        if not valid or (isinstance(value, float) and not math.isfinite(value)):
            broken.append(f"{name}={value!r} must be {rule}{'' if 'finite' in rule or not valid else ' and finite'}")
    if broken:
        raise ConfigError(f"{type(settings).__name__}: {'; '.join(broken)}.")
