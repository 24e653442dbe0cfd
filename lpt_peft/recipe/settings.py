"""What a training run is told: two small frozen dataclasses, stored with the results they led to.

Not here: published settings (`presets.py`), and what a run reads and writes (`fit.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lpt_peft.errors import ConfigError

BYSTANDERS = frozenset({"num_workers", "save_every", "keep_checkpoints"})
"""Settings that may change when a run goes on: they have no say in what is learnt."""

_BACKBONE_DTYPES = ("float32", "bfloat16", "float16")

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


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """How one phase is trained; SGD with momentum, per-step warm-up, then cosine to zero.

    Defaults are the paper's where it gives one (LPT, Dong et al., ICLR 2023, arXiv 2210.01033).
    """

    epochs: int = 40
    """Passes of the instance-balanced half over the images; 0 skips the phase."""
    learning_rate: float = 0.02
    """For a half batch of 256; the run uses `learning_rate * batch_size / 256`."""
    weight_decay: float = 0.01
    """L2; prompts enter only through a norm, so on them it acts as learning-rate control."""
    momentum: float = 0.9
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly."""

    def __post_init__(self) -> None:
        _refuse(
            self,
            {
                "epochs": (self.epochs >= 0, "at least 0"),
                "learning_rate": (self.learning_rate > 0, "above 0"),
                "weight_decay": (self.weight_decay >= 0, "at least 0"),
                "momentum": (0 <= self.momentum < 1, "at least 0 and below 1"),
                "warmup": (0 <= self.warmup <= 1, "a share from 0 to 1"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A whole run: phase "shared", then phase "group", or both at once."""

    shared: PhaseSettings = field(default_factory=PhaseSettings)
    group: PhaseSettings = field(default_factory=PhaseSettings)
    phases: Literal["decoupled", "joint"] = "decoupled"
    """One phase after the other; or, as an ablation, one phase "joint" with the settings of `group`."""
    batch_size: int = 64
    """Images `B` of each half of a step, over all processes: a step sees `2 B`, however they are shared out."""
    accumulate: int = 1
    """Parts that a process cuts its share of a step into, one after the other: the same step in less memory."""
    sampling: Literal["dual", "instance"] = "dual"
    """Instance-balanced and class-balanced halves, or `2 B` instance-balanced images."""
    samples_per_class: int = 4
    """Images of one class that the class-balanced draw takes at a time."""
    loss: Literal["lpt", "agcl", "cross_entropy"] = "lpt"
    """A-GCL weighed over both halves; A-GCL or cross-entropy on all images alike. All with the match term."""
    eta: float = 0.5
    """Weight of the instance-balanced branch of "lpt" at the start; falls linearly to 0."""
    init_keys: Literal["kmeans", "random"] = "kmeans"
    """How keys start in phase "group": centres of the training queries, or at random."""
    init_groups: Literal["shared", "random"] = "shared"
    """How group prompts start: as copies of the trained shared prompt, or at random as in the paper."""
    decay: Literal["all", "selected"] = "all"
    """Weight decay on the whole pool, or only on the groups that a step has chosen."""
    clip_norm: float | None = None
    """Largest norm of the gradient; None does not clip."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Of the backbone's passes; None leaves it to Accelerate's configuration."""
    backbone_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Frozen weights are cast to it once, before training, and stay so; "float32" leaves them as they are. Prompts,
    keys and head stay float32."""
    compile: bool = False
    """Train through `torch.compile`: the first step of each phase takes about a minute, the others less time."""
    average: float | None = None
    """Decay of a moving average of what is learnt, 0.999 for example, which then is the result; None: no average."""
    keep: Literal["last", "best"] = "last"
    """What a phase ends with: its last epoch, or the one of the best balanced accuracy on the validation part."""
    patience: int | None = None
    """Validations without a better one after which a phase ends early; None never."""
    validate_every: int = 1
    """Epochs from one validation to the next, where there is a validation part; the last epoch always has one."""
    save_every: int | None = None
    """Steps from one checkpoint to the next, besides those at the end of a phase; None: one for each epoch."""
    keep_checkpoints: int = 2
    num_workers: int | None = None
    """Processes that load images, for each process that trains; None: one for each core, at most 8, and none for small
    datasets."""
    seed: int = 0

    def __post_init__(self) -> None:
        some, none_or_some = "at least 1", "None or at least 1"
        _refuse(
            self,
            {
                "phases": (self.phases in ("decoupled", "joint"), '"decoupled" or "joint"'),
                "batch_size": (self.batch_size >= 1, some),
                "accumulate": (self.accumulate >= 1, some),
                "sampling": (self.sampling in ("dual", "instance"), '"dual" or "instance"'),
                "samples_per_class": (self.samples_per_class >= 1, some),
                "loss": (self.loss in ("lpt", "agcl", "cross_entropy"), '"lpt", "agcl" or "cross_entropy"'),
                "eta": (self.eta >= 0, "at least 0"),
                "init_keys": (self.init_keys in ("kmeans", "random"), '"kmeans" or "random"'),
                "init_groups": (self.init_groups in ("shared", "random"), '"shared" or "random"'),
                "decay": (self.decay in ("all", "selected"), '"all" or "selected"'),
                "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "None or above 0"),
                "mixed_precision": (
                    self.mixed_precision in (None, "no", "bf16", "fp16"),
                    'None, "no", "bf16" or "fp16"',
                ),
                "backbone_dtype": (self.backbone_dtype in _BACKBONE_DTYPES, " or ".join(map(repr, _BACKBONE_DTYPES))),
                "average": (self.average is None or 0 < self.average < 1, "None or above 0 and below 1"),
                "keep": (self.keep in ("last", "best"), '"last" or "best"'),
                "patience": (self.patience is None or self.patience >= 1, none_or_some),
                "validate_every": (self.validate_every >= 1, some),
                "save_every": (self.save_every is None or self.save_every >= 1, none_or_some),
                "keep_checkpoints": (self.keep_checkpoints >= 1, some),
                "num_workers": (self.num_workers is None or self.num_workers >= 0, "None or at least 0"),
                "seed": (0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            },
        )
        if self.loss == "lpt" and self.sampling != "dual":
            raise ConfigError('loss="lpt" weighs the two halves of a dual batch: it needs sampling="dual".')

    @property
    def plan(self) -> dict[str, PhaseSettings]:
        """The phases that are trained, by name, in order."""
        phases = {"shared": self.shared, "group": self.group} if self.phases == "decoupled" else {"joint": self.group}
        return {name: phase for name, phase in phases.items() if phase.epochs}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSettings:
        """The inverse of `to_dict`; what is left out takes its default.

        Raises:
            ConfigError: A key is unknown or a value out of its range.
        """
        given = dict(known(cls, values))
        for name in ("shared", "group"):
            if name in given:
                given[name] = PhaseSettings(**known(PhaseSettings, given[name]))
        return cls(**given)


def known(kind: type, values: Any) -> Mapping[str, Any]:
    """Names and values out of JSON for a dataclass of settings.

    Raises:
        ConfigError: They are no names and values, a name is unknown, or a value is of another type than its field's.
    """
    types = {field.name: str(field.type) for field in fields(kind)}
    hints = get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{kind.__name__} needs names and values, not {values!r:.80}.")
    if unknown := sorted(set(values) - set(types)):
        raise ConfigError(f"{kind.__name__} has no {', '.join(unknown)}; known are {', '.join(sorted(types))}.")
    for name, value in values.items():
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else None
        if choices is not None and not (isinstance(value, str) and value in choices):
            raise ConfigError(f"{kind.__name__}: {name}={value!r:.80} must be one of {', '.join(choices)}.")
        wanted = _TYPES.get(types[name])
        if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
            raise ConfigError(f"{kind.__name__}: {name}={value!r:.80} must be {types[name]}.")
    return values


def _refuse(settings: object, checks: Mapping[str, tuple[bool, str]]) -> None:
    if broken := [
        f"{name}={getattr(settings, name)!r} must be {rule}" for name, (fine, rule) in checks.items() if not fine
    ]:
        raise ConfigError(f"{type(settings).__name__}: {'; '.join(broken)}.")
