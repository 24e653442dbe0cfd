"""Training configuration dataclasses.

Both are frozen and stored with the results. Not here: published settings (`presets.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lpt_peft.errors import ConfigError

RESUME_IGNORED_FIELDS = frozenset({"num_workers", "save_every", "keep_checkpoints"})
"""Settings that may change when a run is resumed, because they do not affect its result."""

_BACKBONE_DTYPES = ("float32", "bfloat16", "float16")

Loss = Literal["lpt", "agcl", "cross_entropy", "logit_adjusted", "balanced_softmax", "focal", "class_balanced", "ldam"]

_NOT_REWEIGHTED = {
    "lpt": "already trains on class-balanced images in the last epochs",
    "logit_adjusted": "already corrects for class frequencies",
    "balanced_softmax": "already corrects for class frequencies",
    "class_balanced": "has these weights from the start",
}
"""Losses that deferred reweighting would correct for class frequencies twice, with the reason."""

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
    """Settings of one phase: SGD with momentum, warm-up per step, then cosine decay to zero.

    Defaults are the paper's where it gives a value (LPT, Dong et al., ICLR 2023, arXiv 2210.01033).
    """

    epochs: int = 40
    """Passes of the instance-balanced half over the images; 0 skips the phase."""
    learning_rate: float = 0.02
    """For 256 images in each half of a batch; the run uses `learning_rate * (batch_size / 2) / 256`."""
    weight_decay: float = 0.01
    """L2. Prompts enter only through a norm, so for them it controls the effective learning rate."""
    momentum: float = 0.9
    warmup: float = 0.05
    """Fraction of the steps in which the learning rate rises linearly."""

    def __post_init__(self) -> None:
        refuse_invalid(
            self,
            {
                "epochs": (self.epochs >= 0, "at least 0"),
                "learning_rate": (0 < self.learning_rate < float("inf"), "above 0 and finite"),
                "weight_decay": (0 <= self.weight_decay < float("inf"), "at least 0 and finite"),
                "momentum": (0 <= self.momentum < 1, "at least 0 and below 1"),
                "warmup": (0 <= self.warmup <= 1, "a fraction from 0 to 1"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a run: phase "shared", then phase "group", or both at once."""

    shared: PhaseSettings = field(default_factory=PhaseSettings)
    group: PhaseSettings = field(default_factory=PhaseSettings)
    phases: Literal["decoupled", "joint"] = "decoupled"
    """Phases in sequence; or, as an ablation, a single phase "joint" with the settings of `group`."""
    batch_size: int = 128
    """Images of a step over all processes, an even number: instance-balanced half first, then class-balanced half."""
    accumulate: int = 1
    """Chunks into which each process divides its share of a step: the same step in less memory."""
    sampling: Literal["dual", "instance"] = "dual"
    """Instance-balanced and class-balanced halves, or instance-balanced images only."""
    samples_per_class: int = 4
    """Images that the class-balanced half draws from a class at a time."""
    loss: Loss = "lpt"
    """A-GCL weighted per half; or a loss on all images of a step. Each includes the match term."""
    tau: float = 1.0
    """Strength of the adjustment in loss "logit_adjusted"."""
    reweight_from: int | None = None
    """Epoch of each phase, from 0, at which class-balanced weights begin; for agcl, cross_entropy, focal and ldam."""
    eta: float = 0.5
    """Initial weight of the instance-balanced half in loss "lpt"; falls linearly to 0."""
    init_keys: Literal["kmeans", "random"] = "kmeans"
    """Initial keys of phase "group": k-means centers of the training queries, or random."""
    init_groups: Literal["shared", "random"] = "shared"
    """Initial group prompts: copies of the trained shared prompt, or random as in the paper."""
    decay: Literal["all", "selected"] = "all"
    """Weight decay on all groups, or only on the groups that a step selects."""
    clip_norm: float | None = None
    """Largest norm of the gradient; None disables clipping."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Precision of the backbone's computation; None uses Accelerate's configuration."""
    backbone_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Frozen weights are cast to this dtype once, before training; "float32" leaves them as loaded. Prompts, keys and
    head stay float32."""
    compile: bool = False
    """Train with `torch.compile`: the first step of each phase takes about a minute, later steps less time."""
    average: float | None = None
    """Decay of a moving average of the trained parameters, for example 0.999. The average is the result; None: off."""
    keep: Literal["last", "best"] = "last"
    """Result of a phase: its last epoch, or the epoch with the best balanced accuracy on the validation split."""
    patience: int | None = None
    """Validations without improvement after which a phase ends early; None disables this."""
    validate_every: int = 1
    """Epochs between validations, if there is a validation split; the last epoch is always validated."""
    save_every: int | None = None
    """Steps between checkpoints, in addition to the end of each phase; None: once per epoch."""
    keep_checkpoints: int = 2
    num_workers: int | None = None
    """Processes that load images, per training process; None: the number of cores, at most 8, and none for small
    datasets."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive, optional_positive = "at least 1", "None or at least 1"
        refuse_invalid(
            self,
            {
                "phases": (self.phases in ("decoupled", "joint"), '"decoupled" or "joint"'),
                "batch_size": (
                    self.batch_size >= 2 and self.batch_size % 2 == 0,
                    "even and at least 2, since the two halves of a step are equal",
                ),
                "accumulate": (self.accumulate >= 1, positive),
                "sampling": (self.sampling in ("dual", "instance"), '"dual" or "instance"'),
                "samples_per_class": (self.samples_per_class >= 1, positive),
                "loss": (self.loss in get_args(Loss), " or ".join(f'"{name}"' for name in get_args(Loss))),
                "tau": (0 <= self.tau < float("inf"), "at least 0 and finite"),
                "reweight_from": (self.reweight_from is None or self.reweight_from >= 0, "None or at least 0"),
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
                "patience": (self.patience is None or self.patience >= 1, optional_positive),
                "validate_every": (self.validate_every >= 1, positive),
                "save_every": (self.save_every is None or self.save_every >= 1, optional_positive),
                "keep_checkpoints": (self.keep_checkpoints >= 1, positive),
                "num_workers": (self.num_workers is None or self.num_workers >= 0, "None or at least 0"),
                "seed": (0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            },
        )
        if self.loss == "lpt" and self.sampling != "dual":
            raise ConfigError('loss="lpt" weights the two halves of a dual batch, so it needs sampling="dual".')
        if self.tau != 1 and self.loss != "logit_adjusted":
            raise ConfigError(f'tau={self.tau:g} needs loss="logit_adjusted"; loss="{self.loss}" has no adjustment.')
        if self.reweight_from is not None:
            self._check_reweighting(self.reweight_from)

    def _check_reweighting(self, start: int) -> None:
        if reason := _NOT_REWEIGHTED.get(self.loss):
            raise ConfigError(
                f'reweight_from={start} cannot be used with loss="{self.loss}", which {reason}: leave it out, or use '
                'loss="cross_entropy", "focal", "ldam" or "agcl".'
            )
        if start >= (longest := max((phase.epochs for phase in self.plan.values()), default=0)):
            raise ConfigError(
                f"reweight_from={start} is never reached: epochs are counted from 0 in each phase, and the longest has "
                f"{longest}."
            )

    @property
    def half_batch(self) -> int:
        """Images of each half of a step, over all processes; the paper's batch size B."""
        return self.batch_size // 2

    @property
    def plan(self) -> dict[str, PhaseSettings]:
        """Phases to train, by name, in order."""
        phases = {"shared": self.shared, "group": self.group} if self.phases == "decoupled" else {"joint": self.group}
        return {name: phase for name, phase in phases.items() if phase.epochs}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSettings:
        """The inverse of `to_dict`; missing fields take their defaults.

        Raises:
            ConfigError: A key is unknown or a value is out of range.
        """
        given = dict(known(cls, values))
        for name in ("shared", "group"):
            if name in given:
                given[name] = PhaseSettings(**known(PhaseSettings, given[name]))
        return cls(**given)


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
    """Check fields of a settings dataclass.

    Args:
        settings: The dataclass.
        checks: For each field, whether it is valid, and its rule: "at least 1".

    Raises:
        ConfigError: A field is invalid.
    """
    if broken := [
        f"{name}={getattr(settings, name)!r} must be {rule}" for name, (valid, rule) in checks.items() if not valid
    ]:
        raise ConfigError(f"{type(settings).__name__}: {'; '.join(broken)}.")
