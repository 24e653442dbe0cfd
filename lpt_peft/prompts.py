"""SharedPrompt and PromptPool: the learnt tokens, and the choice of groups per image.

Both work alone. Not here: how a prompt enters attention (`lpt_peft.prompting`) and where the query
comes from (`lpt_peft.adapter`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt_peft._numerics import at_least_float32, cosine
from lpt_peft.config import PromptConfig
from lpt_peft.errors import ConfigError, InputError, StateError

_INIT_STD = 0.02
_UNKNOWN = -(2**62)  # stays negative whatever training adds


class SharedPrompt(nn.Module):
    """One prompt for all images: `u_1 ... u_L`, `n` tokens in each block.

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
        _check_sizes(layers=layers, length=length, dim=dim)
        self.prompts = nn.Parameter(torch.empty(layers, length, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new prompts from torch's default generator."""
        nn.init.trunc_normal_(self.prompts, std=_INIT_STD)

    def forward(self) -> Tensor:
        """The prompts (L, n, d)."""
        return self.prompts

    if TYPE_CHECKING:  # torch's own __call__ returns Any
        __call__ = forward

    def extra_repr(self) -> str:
        """Sizes, as torch's own layers show them."""
        layers, length, dim = self.prompts.shape
        return f"layers={layers}, length={length}, dim={dim}"


class PoolMatch(NamedTuple):
    """What a `PromptPool` answers to a query."""

    prompts: Tensor
    """Mean of the chosen groups' prompts (B, layers, n, d), in the query's dtype; under autocast, in autocast's."""
    similarity: Tensor
    """Cosine of query and chosen keys (B, k), descending, float32 or float64."""
    groups: Tensor
    """Chosen groups (B, k), int64."""


class PromptPool(nn.Module):
    r"""A pool of `m` group prompts with keys; every image picks its `k` nearest.

    `sim_i = cos(q, k_i)`; the `k` groups of largest similarity are taken and the prompt is the mean of
    theirs. The choice is per image: nothing of the batch leaks into it. Keys learn from `1 - similarity`
    of the chosen ones; the choice itself has no gradient.

    Source: LPT, Dong et al., ICLR 2023, arXiv 2210.01033.

    Args:
        size: Groups `m`.
        layers: Blocks in which groups act, `L - K`.
        length: Tokens `n` per block.
        dim: Width `d` of the prompts.
        top_k: Groups `k` chosen per image, at most `size`.
        key_dim: Width of query and keys; None means `dim`.

    Attributes:
        prompts: Parameter (m, layers, n, d).
        keys: Parameter (m, key_dim).
        usage: Buffer (m,) int64: how many images chose each group in training mode since
            `reset_usage()`. A group nobody chooses gets no gradient: see `dead_groups`.

    Raises:
        ConfigError: A size is below 1, or `top_k` above `size`.

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
        _check_sizes(size=size, layers=layers, length=length, dim=dim, top_k=top_k, key_dim=key_dim)
        if top_k > size:
            raise ConfigError(f"top_k={top_k} groups cannot be chosen from a pool of size={size}; lower top_k.")
        self.top_k = top_k
        self.prompts = nn.Parameter(torch.empty(size, layers, length, dim))
        self.keys = nn.Parameter(torch.empty(size, key_dim))
        self.register_buffer("usage", torch.zeros(size, dtype=torch.int64))
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: PromptConfig) -> PromptPool:
        """A new pool of the sizes that an adapter's configuration tells."""
        sizes = (config.pool_size, config.group_layers, config.prompt_length, config.dim, config.top_k)
        return cls(*sizes, key_dim=config.feature_dim)

    def reset_parameters(self) -> None:
        """Draw new prompts and keys from torch's default generator."""
        nn.init.trunc_normal_(self.prompts, std=_INIT_STD)
        nn.init.trunc_normal_(self.keys, std=_INIT_STD)

    def forward(self, query: Tensor) -> PoolMatch:
        """Choose groups for queries (B, key_dim), floating point; the choice is made in float32 or float64."""
        keys, prompts = self.keys, self.prompts  # read once: a parametrized tensor is computed at every access
        similarity, groups = cosine(query, keys).topk(self.top_k, dim=-1)
        weights = query.new_zeros(query.shape[0], keys.shape[0]).scatter(1, groups, 1 / self.top_k)
        if self.training:
            with torch.no_grad():
                self.usage += weights.ne(0).sum(0)
        # A product with 0 or 1/k instead of a gather: no (B, k, layers, n, d) copy, and a deterministic gradient.
        mean = weights @ prompts.flatten(1).to(query.dtype)
        return PoolMatch(mean.unflatten(1, prompts.shape[1:]), similarity, groups)

    if TYPE_CHECKING:  # torch's own __call__ returns Any
        __call__ = forward

    @torch.no_grad()
    def init_keys(self, queries: Tensor, *, seed: int = 0, iterations: int = 50) -> None:
        """Set the keys to the directions of spherical k-means centres of training queries.

        The cure for dead groups: every key starts amid images. Keys keep their mean length, so a learning
        rate means the same as before.

        Args:
            queries: Features (N, key_dim), N at least `size`, floating point.
            seed: Of the k-means++ start; no global random state is used.
            iterations: Lloyd steps at most; stops when no query changes its centre.

        Raises:
            InputError: Wrong shape, fewer distinct queries than groups, or a value that is not finite.
        """
        size, dim = self.keys.shape
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise InputError(f"queries must have shape (N, {dim}), got {tuple(queries.shape)}.")
        if not bool(queries.isfinite().all()):
            raise InputError("queries hold NaN or infinity; compute them with adapter.features() on clean images.")
        points = F.normalize(at_least_float32(queries).to(self.keys.device), dim=-1)
        if len(points.unique(dim=0)) < size:
            raise InputError(
                f"init_keys needs at least {size} distinct queries, one per group; got {len(points.unique(dim=0))} "
                f"of {len(points)}. Give more images or make the pool smaller."
            )
        centres = _spherical_kmeans(points, size, torch.Generator().manual_seed(seed), iterations)
        self.keys.copy_(centres * self.keys.norm(dim=-1).mean())

    @torch.no_grad()
    def init_prompts(self, prompts: Tensor) -> None:
        """Start every group from the same prompts, those of a trained shared prompt: groups part as they are chosen.

        Prompts enter attention through a norm, so random ones disturb a trained model at full strength however
        small they are; copies of the shared prompt only weigh it more.

        Args:
            prompts: (layers, n, d) floating point, for example `adapter.shared.prompts[shared_layers:]`.

        Raises:
            InputError: The shape is another.
        """
        if prompts.shape != self.prompts.shape[1:]:
            wanted, got = tuple(self.prompts.shape[1:]), tuple(prompts.shape)
            raise InputError(f"init_prompts needs one prompt for all groups, shape {wanted}, got {got}.")
        self.prompts.copy_(prompts.expand_as(self.prompts))

    def dead_groups(self) -> list[int]:
        """Groups that no image has chosen in training since `reset_usage()`.

        Raises:
            StateError: The counts are unknown: the prompts were loaded from a file that does not hold them.
        """
        if bool((self.usage < 0).any()):
            raise StateError(
                "It is unknown which groups are dead: these prompts were loaded without usage counts. Call "
                "pool.reset_usage(), run training images through the adapter in train mode, then ask again."
            )
        return [group for group, count in enumerate(self.usage.tolist()) if count == 0]

    def reset_usage(self) -> None:
        """Set all counts to zero."""
        self.usage.zero_()

    @torch.no_grad()
    def load_usage(self, usage: Tensor | None) -> None:
        """Set the counts (m,) int64; None makes them unknown until `reset_usage()`."""
        if usage is None:
            self.usage.fill_(_UNKNOWN)
        else:
            self.usage.copy_(usage)

    def extra_repr(self) -> str:
        """Sizes, as torch's own layers show them."""
        size, layers, length, dim = self.prompts.shape
        return f"size={size}, layers={layers}, length={length}, dim={dim}, top_k={self.top_k}"


@torch.no_grad()
def decay_selected(parameter: nn.Parameter, weight_decay: float) -> None:
    """Add L2 decay to the gradient of the groups that have one, in place: a cure for dead groups.

    Ordinary weight decay also shrinks the groups that a batch did not choose. Give the pool's parameters
    `weight_decay=0` in the optimizer and call this between `backward()` and `step()` instead.

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
    selected = parameter.grad.flatten(1).ne(0).any(1).view(-1, *[1] * (parameter.ndim - 1))
    parameter.grad += torch.where(selected, weight_decay * parameter, 0.0)


def _spherical_kmeans(points: Tensor, size: int, generator: torch.Generator, iterations: int) -> Tensor:
    """Unit centres (size, d) of unit points (N, d): k-means++ start, then Lloyd steps on the sphere."""
    first = int(torch.randint(len(points), (), generator=generator))
    centres = points[first : first + 1]
    while len(centres) < size:
        # Squared distance on the sphere is 2 (1 - cos); rounding must not let a taken point be drawn again.
        gap = (1 - (points @ centres.T).amax(1)).cpu().double()
        gap[gap < 1e-7] = 0
        if not bool(gap.any()):
            gap = (points[:, None] != centres).any(-1).all(1).cpu().double()
        pick = int(torch.multinomial(gap, 1, generator=generator))
        centres = torch.cat([centres, points[pick : pick + 1]])
    owner = torch.full((len(points),), -1, device=points.device)
    for _ in range(iterations):
        nearest = (points @ centres.T).argmax(1)
        if torch.equal(nearest, owner):
            break
        owner = nearest
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        # A centre that lost all its points, or whose points cancel, stays where it was.
        moved = sums.norm(dim=-1, keepdim=True) > 1e-6
        centres = torch.where(moved, F.normalize(sums, dim=-1), centres)
    return centres


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
