"""Training configuration dataclasses.

Both are frozen and stored with the results. Defaults are the settings that won on validation images of Emoji-LT
(`docs/results.md`). Not here: rules of their values (`settings_checks.py`), default learning rates (`rates.py`), and
published settings (`presets.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lpt_peft.recipe.method_settings import MethodName
from lpt_peft.recipe.rates import with_rates
from lpt_peft.recipe.settings_checks import Loss, check_phase, check_train, known

RESUME_IGNORED_FIELDS = frozenset({"num_workers", "save_every", "keep_checkpoints"})
"""Settings that may change when a run is resumed, because they do not affect its result."""


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """Settings of one phase: learning rate with warm-up per step, then cosine decay to zero."""

    epochs: int = 40
    """Passes of the instance-balanced half over the images; 0 skips the phase."""
    learning_rate: float | None = None
    """With AdamW, the rate itself; with SGD, that for 256 images in each half of a batch, of which the run uses
    `learning_rate * (batch_size / 2) / 256`. None: the default of the method and the optimizer in
    `recipe.DEFAULT_RATES`, for "lpt" 0.01 with AdamW and 0.02 with SGD."""
    head_learning_rate: float | None = None
    """Learning rate of the head, with the same scaling and schedule. None: `learning_rate`, or 10 times that with
    method "full"."""
    pool_learning_rate: float | None = None
    """Learning rate of the group prompts; None: 3 times `learning_rate`. Only that of `group` is used. A group's
    gradient is a mean over all images of a batch, most of which select other groups: with SGD, groups train about
    `pool_size` times slower than a shared prompt at the same rate."""
    weight_decay: float = 0.01
    """L2 in SGD, decoupled in AdamW. Prompts enter only through a norm, so for them it controls the effective learning
    rate."""
    momentum: float = 0.9
    """Of SGD; in AdamW, the decay `beta1` of the first moment."""
    warmup: float = 0.05
    """Fraction of the steps in which the learning rate rises linearly."""

    def __post_init__(self) -> None:
        check_phase(self)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a run.

    `shared` has the settings of the first phase, which is the only one with `phases="joint"` and "shared" and with
    other methods than "lpt"; `group` has those of the second phase of `phases="decoupled"`, and always the rate of the
    group prompts, `group.pool_learning_rate`.
    """

    method: MethodName = "lpt"
    """What is trained: shared prompt and groups; or, as baselines with a single phase, the shared prompt in all blocks,
    prompt tokens before the first block, the head alone, or all weights of the ViT."""
    shared: PhaseSettings = field(default_factory=PhaseSettings)
    group: PhaseSettings = field(default_factory=PhaseSettings)
    phases: Literal["joint", "decoupled", "shared"] = "joint"
    """Shared prompt and groups together; or phase "shared", then phase "group", as in the paper; or phase "shared"
    alone. Other methods have a single phase anyway."""
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
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum, as in the paper, which scales the learning rates with the batch size."""
    weight_noise: float = 0.0
    """Standard scale `rho` of Gaussian noise on the weights where a step takes its gradient, relative to each tensor's
    root mean square (GNM-PT, NeurIPS 2024); 0: no noise."""
    eta: float = 0.5
    """Initial weight of the instance-balanced half in loss "lpt"; falls linearly to 0."""
    init_prompts: Literal["tokens", "random"] = "tokens"
    """Initial shared prompt: tokens of training images in the plain ViT (SPT, ICML 2024), or that of the adapter. A
    shared prompt that was loaded or trained before (`adapter.trained_parts`) is kept."""
    init_head: Literal["random", "class_mean"] = "random"
    """Initial head of the first phase: that of the adapter, or class means of its features (LIFT, ICML 2024)."""
    init_keys: Literal["kmeans", "random"] = "kmeans"
    """Initial keys of the groups: k-means centers of the training queries, or random."""
    init_groups: Literal["tokens", "shared", "random"] = "tokens"
    """Initial group prompts: tokens of the images nearest to each key, the shared prompt, or random."""
    query_regularizer: float = 0.0
    """Weight of the regularizer of OS-Prompt++ where groups are trained, for query "block_k"; its paper uses 1e-4; 0:
    off."""
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
        check_train(self)

    @property
    def half_batch(self) -> int:
        """Images of each half of a step, over all processes; the paper's batch size B."""
        return self.batch_size // 2

    @property
    def plan(self) -> dict[str, PhaseSettings]:
        """Phases to train, by name, in order, with numbers as learning rates.

        The phase of other methods than "lpt" is called "shared" as well: the name is part of the seeds, so that all
        methods see the same crops.
        """
        phases = {"shared": self.shared}
        if self.method == "lpt" and self.phases == "joint":
            phases = {"joint": replace(self.shared, pool_learning_rate=self.group.pool_learning_rate)}
        elif self.method == "lpt" and self.phases == "decoupled":
            phases["group"] = self.group
        return {name: with_rates(phase, self) for name, phase in phases.items() if phase.epochs}

    def resolved(self) -> TrainSettings:
        """Return a copy for records, in which the learning rates of the phases that are trained are numbers.

        Settings that have no effect stay as they are.
        """
        shared, group = self.shared, self.group
        for name, phase in self.plan.items():
            if name == "group":
                group = phase
            else:
                shared = replace(phase, pool_learning_rate=shared.pool_learning_rate)
            if name == "joint":
                group = replace(group, pool_learning_rate=phase.pool_learning_rate)
        return replace(self, shared=shared, group=group)

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
