"""Configuration of prompts and head, and metadata of prompt files.

Not here: settings of the training (`lpt_peft.recipe`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from torch import Tensor

from lpt_peft._classes import integers_in_order, names_in_order
from lpt_peft.errors import ConfigError, InputError

MAX_CLASSES = 1_000_000

Phase = Literal["shared", "group"]
PHASES: tuple[Phase, ...] = ("shared", "group")

Query = Literal["final", "block_k"]
QUERIES: tuple[Query, ...] = ("final", "block_k")
Placement = Literal["deep", "shallow"]
PLACEMENTS: tuple[Placement, ...] = ("deep", "shallow")
BLOCK_K_MARK = "block_k_query"
"""Name of a scalar in state dicts of adapters with the block-K query; their keys have another meaning."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Sizes of prompts and head, which determine the shape of every trained tensor.

    Args:
        dim: Width `d` of the backbone's blocks.
        depth: Number of blocks `L`.
        num_classes: Classes `C` of the head, 1 to 1,000,000.
        feature_dim: Width of the pooled feature and of class vectors; None means `dim`.
        prompt_length: Tokens `n` of a prompt in each block.
        shared_layers: Number `K` of blocks that have only the shared prompt; groups act in the `L - K` blocks after
            them. None means `depth // 2`.
        pool_size: Number of groups `m`.
        top_k: Groups `k` chosen per image.
        logit_scale: Scale `s` of the cosine classifier.
        query: What is compared with the keys: "final", the pooled feature under the shared prompts, which takes a
            second pass through the last `L - K` blocks; or "block_k", the class token that enters block `K + 1` (the
            mean patch if there is none), normalized without parameters, which takes a single pass.
        placement: "deep", a prompt in every block, as in the paper; or "shallow", `n` tokens that are appended to the
            tokens that enter block 1 and pass through all blocks (VPT-Shallow, Jia et al., ECCV 2022). Shallow prompts
            have no groups: `shared_layers`, `pool_size`, `top_k` and `query` are not used.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> config = PromptConfig(dim=768, depth=12, num_classes=365)
        >>> config.shared_layers, config.num_prompt_parameters
        (6, 1029120)
    """

    dim: int
    depth: int
    num_classes: int
    feature_dim: int | None = None
    prompt_length: int = 10
    shared_layers: int | None = None
    pool_size: int = 20
    top_k: int = 2
    logit_scale: float = 20.0
    query: Query = "final"
    placement: Placement = "deep"

    def __post_init__(self) -> None:
        if self.shared_layers is None:
            object.__setattr__(self, "shared_layers", self.depth // 2 if isinstance(self.depth, int) else None)
        if self.feature_dim is None:
            object.__setattr__(self, "feature_dim", self.dim)
        integers = [field.name for field in fields(self) if str(field.type).startswith("int")]
        for name in integers:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{name}={value!r} must be an integer, not {type(value).__name__}.")
        upper = {"num_classes": MAX_CLASSES, "top_k": self.pool_size, "shared_layers": self.depth - 1}
        for name in integers:
            value, low, high = getattr(self, name), 0 if name == "shared_layers" else 1, upper.get(name)
            if value < low or (high is not None and value > high):
                bound = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ConfigError(f"{name}={value} must be {bound} (depth={self.depth}, pool_size={self.pool_size}).")
        scale = self.logit_scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale <= 0:
            raise ConfigError(f"logit_scale={scale!r} must be a finite number greater than 0; the usual value is 20.")
        object.__setattr__(self, "logit_scale", float(scale))
        if self.query not in QUERIES:
            raise ConfigError(f'query={self.query!r} must be "final" or "block_k".')
        if self.placement not in PLACEMENTS:
            raise ConfigError(f'placement={self.placement!r} must be "deep" or "shallow".')
        if self.query == "block_k" and not self.has_groups:
            raise ConfigError(
                'query="block_k" selects groups, and placement="shallow" has no groups: leave one of them out.'
            )
        if self.query == "block_k" and self.shared_layers == 0:
            raise ConfigError(
                'query="block_k" needs shared_layers of at least 1, not 0: the class token that enters block 1 is the '
                'same for all images, so they would all select the same groups. Give query="final".'
            )

    @property
    def has_groups(self) -> bool:
        """Whether there is a pool of group prompts, and a phase "group"."""
        return self.placement == "deep"

    @property
    def unused_sizes(self) -> tuple[str, ...]:
        """Names of the sizes of groups that were changed although there are none."""
        if self.has_groups:
            return ()
        defaults = {"pool_size": type(self).pool_size, "top_k": type(self).top_k, "shared_layers": self.depth // 2}
        return tuple(name for name, default in defaults.items() if getattr(self, name) != default)

    @property
    def group_layers(self) -> int:
        """Number `L - K` of blocks in which the groups act."""
        return self.depth - self.first_group_layer

    @property
    def first_group_layer(self) -> int:
        """Index `K` of the first block with group prompts, counted from 0."""
        assert self.shared_layers is not None  # noqa: S101 - set in __post_init__; narrows the type
        return self.shared_layers

    @property
    def key_dim(self) -> int:
        """Width of queries and keys."""
        assert self.feature_dim is not None  # noqa: S101 - set in __post_init__; narrows the type
        return self.dim if self.query == "block_k" else self.feature_dim

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every trained tensor, as in `adapter_state_dict()`."""
        assert self.feature_dim is not None  # noqa: S101 - set in __post_init__; narrows the type
        pool = {
            "pool.prompts": (self.pool_size, self.group_layers, self.prompt_length, self.dim),
            "pool.keys": (self.pool_size, self.key_dim),
        }
        return {
            "shared.prompts": (self.depth if self.has_groups else 1, self.prompt_length, self.dim),
            **(pool if self.has_groups else {}),
            "head.weight": (self.num_classes, self.feature_dim),
        }

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Check names, shapes, dtypes and values of trained tensors.

        Raises:
            InputError: A name, a shape, a dtype or a value (NaN, infinity) is wrong.
        """
        shapes = self.tensor_shapes
        if set(shapes) <= set(tensors) and (mismatch := self.query_mismatch(BLOCK_K_MARK in tensors)):
            raise InputError(mismatch)
        if set(tensors) - {BLOCK_K_MARK} != set(shapes):
            missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes) - {BLOCK_K_MARK})
            raise InputError(f"An adapter has exactly the tensors {list(shapes)}; missing {missing}, unknown {extra}.")
        for name, shape in shapes.items():
            tensor = tensors[name]
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise InputError(f"{name} must be a floating point tensor.")
            if tuple(tensor.shape) != shape:
                raise InputError(f"{name} has shape {tuple(tensor.shape)}, this adapter needs {shape}.")
            if not bool(tensor.isfinite().all()):
                raise InputError(f"{name} holds NaN or infinity: the training diverged.")

    def query_mismatch(self, marked: bool) -> str | None:
        """Return why tensors of an adapter do not fit, if their keys are for the other kind of query.

        Args:
            marked: Whether `block_k_query` is among the tensors.
        """
        found = "block_k" if marked else "final"
        if found == self.query:
            return None
        return (
            f'The keys of these tensors are for query="{found}", and this adapter has query="{self.query}". Wrap the '
            f'ViT with query="{found}", or load a prompt file by load_prompts, which sets the query.'
        )

    @property
    def num_prompt_parameters(self) -> int:
        """Trained parameters of both phases, without the head."""
        return sum(math.prod(shape) for name, shape in self.tensor_shapes.items() if name != "head.weight")

    @property
    def layout(self) -> str:
        """Number and place of prompts and groups, in words."""
        if not self.has_groups:
            return f"{self.prompt_length} tokens appended before block 1, through all {self.depth} blocks; no groups"
        return (
            f"{self.prompt_length} tokens in each of {self.depth} blocks; {self.pool_size} groups after block "
            f"{self.shared_layers}, {self.top_k} for an image, query {self.query}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary of plain JSON values; the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptConfig:
        """Build from the output of `to_dict`.

        Raises:
            ConfigError: A key is unknown or missing, or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(
                f"Unknown key(s) {', '.join(unknown)} in a PromptConfig; known are {', '.join(sorted(known))}."
            )
        if missing := sorted({"dim", "depth", "num_classes"} - set(values)):
            raise ConfigError(f"A PromptConfig needs the key(s) {missing}.")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class PromptMetadata:
    """Contents of a prompt file besides the prompts; an adapter keeps them between loading and saving.

    Args:
        class_counts: Training images of each class, for shot metrics.
        label_names: Name of each class.
        training: Free JSON: recipe, metrics with their shot rule, seeds.
        preprocess: How images become tensors, where it differs from the backbone's own data configuration; see
            docs/explanation/prompt-file.md for the keys.
        temperature: Divisor of the logits that calibrates the probabilities; None if it was not estimated.
        backbone_dtype: dtype of the frozen weights during training, such as "bfloat16"; None if unknown.
    """

    class_counts: tuple[int, ...] | None = None
    label_names: tuple[str, ...] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    temperature: float | None = None
    backbone_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.label_names is not None:  # names may repeat: id2label of ImageNet has "crane" twice
            object.__setattr__(self, "label_names", names_in_order(self.label_names, unique=False))
        if self.class_counts is not None:
            counts = integers_in_order(self.class_counts, label_names=self.label_names)
            object.__setattr__(self, "class_counts", counts)

    def updated(
        self,
        *,
        class_counts: Any = None,
        label_names: Any = None,
        training: Mapping[str, Any] | None = None,
        preprocess: Mapping[str, Any] | None = None,
    ) -> PromptMetadata:
        """Return a copy in which the arguments that are not None replace the fields.

        Raises:
            InputError: Counts or names have the wrong type or no order.
        """
        names = self.label_names if label_names is None else names_in_order(label_names)
        counts = None if class_counts is None else integers_in_order(class_counts, label_names=names)
        return replace(
            self,
            class_counts=self.class_counts if class_counts is None else counts,
            label_names=names,
            training=self.training if training is None else training,
            preprocess=self.preprocess if preprocess is None else preprocess,
        )
