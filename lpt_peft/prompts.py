"""Trainable prompts: a shared prompt and a pool of group prompts with top-k retrieval.

Not here: how prompts enter attention (`lpt_peft.prompting`) and where queries come from (`lpt_peft.passes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt_peft._features import check_features, check_prompts
from lpt_peft._kmeans import spherical_kmeans
from lpt_peft._numbers import checked_integer
from lpt_peft._numerics import at_least_float32, cosine
from lpt_peft._tensors import write_value
from lpt_peft.config import PromptConfig
from lpt_peft.errors import ConfigError, InputError, StateError

_INIT_STD = 0.02
_UNKNOWN = -(2**62)  # stays negative whatever training adds


class SharedPrompt(nn.Module):
    """Prompt shared by all images: `u_1 ... u_L`, `n` tokens in each block.

    Args:
        layers: Number of blocks `L`.
        length: Tokens per block `n`.
        dim: Width `d`.

    Attributes:
        prompts: Parameter (L, n, d), trunc_normal(std 0.02).

    Example:
        >>> SharedPrompt(layers=12, length=10, dim=768).prompts.shape
        torch.Size([12, 10, 768])
    """

    def __init__(self, layers: int, length: int, dim: int) -> None:
        super().__init__()
        for name, value in {"layers": layers, "length": length, "dim": dim}.items():
            checked_integer(name, value, 1)
        self.prompts = nn.Parameter(torch.empty(layers, length, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new prompts from torch's default generator."""
        nn.init.trunc_normal_(self.prompts, std=_INIT_STD)

    def init_prompts(self, prompts: Tensor) -> None:
        """Set the prompts, for example to tokens of images: see `adapter.sample_tokens`.

        Args:
            prompts: (L, n, d) floating point, on any device.

        Raises:
            InputError: The shape is wrong.
        """
        check_prompts(prompts, tuple(self.prompts.shape))
        write_value(self, "prompts", prompts)

    def forward(self) -> Tensor:
        """The prompts (L, n, d)."""
        return self.prompts

    if TYPE_CHECKING:  # torch's own __call__ returns Any
        __call__ = forward

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        layers, length, dim = self.prompts.shape
        return f"layers={layers}, length={length}, dim={dim}"


class PoolMatch(NamedTuple):
    """Result of a `PromptPool` for a batch of queries."""

    prompts: Tensor
    """Mean prompt of the selected groups (B, layers, n, d), in the dtype of the query or of autocast."""
    similarity: Tensor
    """Cosines of query and selected keys (B, k), in descending order, float32 or float64."""
    groups: Tensor
    """Indices of the selected groups (B, k), int64."""


class PromptPool(nn.Module):
    r"""Pool of `m` group prompts with keys, from which every image selects the `k` nearest groups.

    With `sim_i = cos(q, k_i)`, the `k` groups of largest similarity are selected, and their mean is the prompt. Each
    image is handled independently of the rest of the batch. Keys are trained by `1 - similarity` of the selected
    groups; the selection has no gradient.

    Source: LPT, Dong et al., ICLR 2023, arXiv 2210.01033.

    Args:
        size: Number of groups `m`.
        layers: Number of blocks with group prompts, `L - K`.
        length: Tokens `n` per block.
        dim: Width `d` of the prompts.
        top_k: Number of groups `k` selected per image, at most `size`.
        key_dim: Width of queries and keys; None means `dim`.

    Attributes:
        prompts: Parameter (m, layers, n, d).
        keys: Parameter (m, key_dim).
        usage: Buffer (m,) int64: number of images that selected each group in training mode since `reset_usage()`.
            Groups that are never selected get no gradient: see `dead_groups`.

    Raises:
        ConfigError: A size is not an integer of at least 1, or `top_k` exceeds `size`.

    Example:
        >>> pool = PromptPool(size=20, layers=6, length=10, dim=768)
        >>> match = pool(torch.randn(4, 768))
        >>> match.prompts.shape, match.similarity.shape, match.groups.shape
        (torch.Size([4, 6, 10, 768]), torch.Size([4, 2]), torch.Size([4, 2]))
    """

    usage: Tensor

    def __init__(
        self, size: int, layers: int, length: int, dim: int, top_k: int = 2, *, key_dim: int | None = None
    ) -> None:
        super().__init__()
        key_dim = dim if key_dim is None else key_dim
        sizes = {"size": size, "layers": layers, "length": length, "dim": dim, "top_k": top_k, "key_dim": key_dim}
        for name, value in sizes.items():
            checked_integer(name, value, 1)
        if top_k > size:
            raise ConfigError(f"top_k={top_k} groups cannot be selected from a pool of size={size}: reduce top_k.")
        self.top_k = int(top_k)
        self.prompts = nn.Parameter(torch.empty(size, layers, length, dim))
        self.keys = nn.Parameter(torch.empty(size, key_dim))
        self.register_buffer("usage", torch.zeros(size, dtype=torch.int64))
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: PromptConfig) -> PromptPool:
        """Create a pool with the sizes of an adapter configuration."""
        sizes = (config.pool_size, config.group_layers, config.prompt_length, config.dim, config.top_k)
        return cls(*sizes, key_dim=config.key_dim)

    def reset_parameters(self) -> None:
        """Draw new prompts and keys from torch's default generator."""
        nn.init.trunc_normal_(self.prompts, std=_INIT_STD)
        nn.init.trunc_normal_(self.keys, std=_INIT_STD)

    def forward(self, query: Tensor) -> PoolMatch:
        """Select groups for floating-point queries (B, key_dim); similarities are float32 or float64.

        Raises:
            InputError: `query` is not a floating-point tensor of shape (B, key_dim) on the device of the pool.
        """
        keys = self.keys  # read once, because a parametrized tensor is computed at every access
        check_features("query", query, keys.shape[1], rows="B", hint="pass one feature per image", device=keys.device)
        return self.select(cosine(query, keys), query.dtype)

    def select(self, similarity: Tensor, dtype: torch.dtype) -> PoolMatch:
        """Select groups by similarities with all keys (B, m), cosines or predictions of them; prompts in `dtype`."""
        prompts = self.prompts
        selected, groups = similarity.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(similarity, dtype=dtype).scatter(1, groups, 1 / self.top_k)
        if self.training:
            with torch.no_grad():
                self.usage += weights.ne(0).sum(0)
        # A product with weights 0 or 1/k needs no (B, k, layers, n, d) copy and has a deterministic gradient.
        mean = weights @ prompts.flatten(1).to(dtype)
        return PoolMatch(mean.unflatten(1, prompts.shape[1:]), selected, groups)

    if TYPE_CHECKING:  # torch's own __call__ returns Any
        __call__ = forward

    @torch.no_grad()
    def init_keys(self, queries: Tensor, *, seed: int = 0, iterations: int = 50) -> None:
        """Set the keys to the spherical k-means centers of training queries.

        Every key then starts close to images, which prevents dead groups. The mean norm of the keys does not change, so
        the learning rate keeps its meaning.

        Args:
            queries: Floating-point features (N, key_dim), with N at least `size`.
            seed: Seed of the k-means++ initialization; global random state is not used.
            iterations: Maximum number of Lloyd iterations; fewer if the assignment converges.

        Raises:
            InputError: The shape is wrong, there are fewer distinct queries than groups, or a value is not finite.
        """
        size = len(self.keys)
        check_features("queries", queries, self.keys.shape[1], rows="N", hint="pass one feature per image")
        seed, iterations = checked_integer("seed", seed, 0), checked_integer("iterations", iterations, 0)
        if not bool(queries.isfinite().all()):
            raise InputError("queries contain NaN or infinity: compute them with adapter.features() on valid images.")
        points = F.normalize(at_least_float32(queries).to(self.keys.device), dim=-1)
        distinct = len(points.unique(dim=0))
        if distinct < size:
            raise InputError(
                f"init_keys needs at least {size} distinct queries, one per group, but only {distinct} of "
                f"{len(points)} are distinct: pass more images or reduce the pool size."
            )
        centers = spherical_kmeans(points, size, torch.Generator().manual_seed(seed), iterations)
        self.keys.copy_(centers * self.keys.norm(dim=-1).mean())

    @torch.no_grad()
    def init_prompts(self, prompts: Tensor) -> None:
        """Initialize every group with copies of trained prompts, or with different prompts.

        Prompts enter attention through a norm, so even small random prompts disturb a trained model at full strength.
        Copies of the shared prompt only increase its weight; training makes the groups diverge. Tokens of the images
        nearest to each key let them differ from the start: `lpt_peft.starts.nearest_images`.

        Args:
            prompts: Floating point, (m, layers, n, d); or (layers, n, d) for all groups, for example
                `adapter.shared.prompts[shared_layers:]`.

        Raises:
            InputError: The shape is wrong.
        """
        shape = tuple(self.prompts.shape)
        check_prompts(prompts, shape[1:], shape)
        write_value(self, "prompts", prompts.expand(shape))

    def dead_groups(self) -> list[int]:
        """Return the groups that no image has selected in training mode since `reset_usage()`.

        Raises:
            StateError: The usage is unknown: no image was counted, or the prompts come from a file without counts.
        """
        if bool((self.usage < 0).any()) or not bool((self.usage > 0).any()):
            raise StateError(
                "The usage of the groups is unknown: no image was counted, or the prompts come from a file without "
                "counts. Call pool.reset_usage(), run training images through the model in train() mode, then call "
                "dead_groups() again."
            )
        return [group for group, count in enumerate(self.usage.tolist()) if count == 0]

    def reset_usage(self) -> None:
        """Reset the usage counts."""
        self.usage.zero_()

    @torch.no_grad()
    def load_usage(self, usage: Tensor | None) -> None:
        """Set the counts (m,) int64; None makes them unknown until `reset_usage()`."""
        if usage is None:
            self.usage.fill_(_UNKNOWN)
        else:
            self.usage.copy_(usage)

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        size, layers, length, dim = self.prompts.shape
        return f"size={size}, layers={layers}, length={length}, dim={dim}, top_k={self.top_k}"


@torch.no_grad()
def decay_selected(parameter: nn.Parameter, weight_decay: float) -> None:
    """Add L2 decay in place to the gradients of groups that have a gradient, to prevent dead groups.

    Ordinary weight decay also shrinks groups that a batch did not select. Instead, set `weight_decay=0` for the pool's
    parameters in the optimizer and call this function between `backward()` and `step()`.

    Args:
        parameter: `pool.prompts` (m, layers, n, d) or `pool.keys` (m, d).
        weight_decay: Coefficient of `w` in `grad + weight_decay * w`.

    Example:
        >>> keys = nn.Parameter(torch.ones(2, 3))
        >>> keys.grad = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> decay_selected(keys, 0.1)
        >>> keys.grad
        tensor([[0.6000, 0.1000, 0.1000],
                [0.0000, 0.0000, 0.0000]])
    """
    if parameter.grad is None:
        return
    parameter.grad += torch.where(selected_groups(parameter.grad), weight_decay * parameter, 0.0)


def selected_groups(gradient: Tensor) -> Tensor:
    """Groups with a nonzero gradient, which are those that the batch selected.

    Args:
        gradient: Of `pool.prompts` (m, layers, n, d) or `pool.keys` (m, d).

    Returns:
        (m, 1, ...) bool, with as many dimensions as `gradient`.
    """
    return gradient.flatten(1).ne(0).any(1).view(-1, *[1] * (gradient.ndim - 1))
