"""What a training run is told: two small frozen dataclasses, stored with the results they led to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lpt_peft.errors import ConfigError


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
        checks = {
            "epochs": self.epochs >= 0,
            "learning_rate": self.learning_rate > 0,
            "weight_decay": self.weight_decay >= 0,
            "momentum": 0 <= self.momentum < 1,
            "warmup": 0 <= self.warmup <= 1,
        }
        _refuse(self, checks)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A whole run: phase "shared", then phase "group"."""

    shared: PhaseSettings = field(default_factory=PhaseSettings)
    group: PhaseSettings = field(default_factory=PhaseSettings)
    batch_size: int = 64
    """Images `B` of each half; a step sees `2 B` on every process."""
    sampling: Literal["dual", "instance"] = "dual"
    """Instance-balanced and class-balanced halves, or `2 B` instance-balanced images."""
    samples_per_class: int = 4
    """Images of one class that the class-balanced draw takes at a time."""
    loss: Literal["lpt", "cross_entropy"] = "lpt"
    """A-GCL with the match term on both halves, or plain cross-entropy."""
    eta: float = 0.5
    """Weight of the instance-balanced branch at the start; falls linearly to 0."""
    init_keys: Literal["kmeans", "random"] = "kmeans"
    """How keys start in phase "group": centres of the training queries, or at random."""
    init_groups: Literal["shared", "random"] = "shared"
    """How group prompts start: as copies of the trained shared prompt, or at random as in the paper."""
    decay: Literal["all", "selected"] = "all"
    """Weight decay on the whole pool, or only on the groups that a step has chosen."""
    clip_norm: float | None = None
    """Largest norm of the gradient; None does not clip."""
    num_workers: int = 0
    """Processes that load images."""
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "batch_size": self.batch_size >= 1,
            "sampling": self.sampling in ("dual", "instance"),
            "samples_per_class": self.samples_per_class >= 1,
            "loss": self.loss in ("lpt", "cross_entropy"),
            "eta": self.eta >= 0,
            "init_keys": self.init_keys in ("kmeans", "random"),
            "init_groups": self.init_groups in ("shared", "random"),
            "decay": self.decay in ("all", "selected"),
            "clip_norm": self.clip_norm is None or self.clip_norm > 0,
            "num_workers": self.num_workers >= 0,
        }
        _refuse(self, checks)
        if self.loss == "lpt" and self.sampling != "dual":
            raise ConfigError('loss="lpt" weighs the two halves of a dual batch: it needs sampling="dual".')

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready dictionary."""
        return asdict(self)


def _refuse(settings: object, checks: dict[str, bool]) -> None:
    if broken := [name for name, fine in checks.items() if not fine]:
        told = ", ".join(f"{name}={getattr(settings, name)!r}" for name in broken)
        raise ConfigError(f"{type(settings).__name__}: {told} is out of range; see the attribute's description.")
