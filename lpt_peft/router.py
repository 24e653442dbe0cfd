"""Router: predicts the similarities of the final query from tokens of block K, so that a second pass is not needed.

Ridge regression in closed form, from sums over batches. Not here: tokens and queries of an adapter
(`lpt_peft.routing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt_peft._features import check_features
from lpt_peft._numerics import at_least_float32, full_precision
from lpt_peft.errors import InputError

PENALTIES = tuple(10.0**power for power in range(-7, 2))
"""Penalties that a fit without a given penalty tries on held-out images."""

MAX_WIDTH, MAX_SEED = 2**14, 2**32 - 1
"""Limits of a layout: a prompt file states them in a few bytes, and the projection is drawn from them."""


class RouterLayout(NamedTuple):
    """How tokens become the features of a router."""

    blocks: int = 1
    """Block boundaries whose tokens are used: that before block `K + 1` and those before it."""
    width: int = 0
    """Random features in addition to the tokens; 0: none."""
    seed: int = 0
    """Seed of the random projection."""

    def describe(self) -> str:
        """Describe the features in a few words."""
        tokens = "block K" if self.blocks == 1 else f"the {self.blocks} block boundaries up to K"
        return f"tokens of {tokens}" + (f" and {self.width} random features of them" if self.width else "")


class Router(nn.Module):
    """Linear prediction of the similarities of the final query with all keys.

        x = concatenation of layer_norm(class token) and layer_norm(mean patch) of each block boundary
        similarity = W [x; relu(x R / sqrt(len(x)))] + b,    R Gaussian from a seed, left out for width 0

    Args:
        weight: `W` (m, F), floating point.
        bias: `b` (m,), floating point.
        layout: Blocks, number of random features and their seed.

    Attributes:
        weight: Buffer (m, F).
        bias: Buffer (m,).
        layout: `RouterLayout`.

    Example:
        >>> router = Router(torch.ones(3, 4), torch.zeros(3), RouterLayout())
        >>> router(torch.ones(2, 4)).shape
        torch.Size([2, 3])
    """

    weight: Tensor
    bias: Tensor
    projection: Tensor
    layout_numbers: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, layout: RouterLayout) -> None:
        super().__init__()
        self.layout = layout
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("layout_numbers", torch.tensor(layout))
        inputs = weight.shape[1] - layout.width
        projection = random_projection(inputs, layout.width, layout.seed).to(weight)
        self.register_buffer("projection", projection, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Predict the similarities (B, m) from inputs (B, F - width); float32 or float64."""
        with full_precision(inputs.device.type):
            features = expand(at_least_float32(inputs), at_least_float32(self.projection))
            weight = at_least_float32(self.weight)
            return F.linear(features.to(weight.dtype), weight, at_least_float32(self.bias))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Averaged copies of a model may have rounded the buffer.
        destination[prefix + "layout_numbers"] = torch.tensor(self.layout, device=self.weight.device)

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        size, width = self.weight.shape
        return f"groups={size}, features={width}, random={self.layout.width}, blocks={self.layout.blocks}"


def router_shapes(layout: RouterLayout, groups: int, dim: int, columns: int) -> tuple[tuple[int, int], tuple[int]]:
    """Shapes of weight and bias of a router; models without class token have half of the tokens.

    Args:
        layout: Of the router.
        groups: Number of groups, m.
        dim: Width of a token.
        columns: Columns of the weight, which decide between the two widths.
    """
    widths = [layout.width + layout.blocks * dim * tokens for tokens in (1, 2)]
    return (groups, columns if columns in widths else widths[1]), (groups,)


def normalized_tokens(tokens: Iterable[Tensor | None]) -> Tensor:
    """Concatenate tokens (B, d), each normalized without parameters, to (B, n d), float32 or float64."""
    given = [at_least_float32(token) for token in tokens if token is not None]
    return torch.cat([F.layer_norm(token, token.shape[-1:]) for token in given], dim=-1)


def random_projection(inputs: int, width: int, seed: int) -> Tensor:
    """Gaussian matrix (inputs, width), float32; the same for a seed in every version and on every device."""
    # numpy guarantees the stream of the legacy generator; torch's differs between versions and devices.
    drawn = np.random.RandomState(seed).standard_normal((inputs, width))
    return torch.from_numpy(drawn.astype(np.float32))


def expand(inputs: Tensor, projection: Tensor) -> Tensor:
    """Append `relu(inputs R / sqrt(n))` (B, width) to inputs (B, n)."""
    if not projection.shape[1]:
        return inputs
    hidden = inputs @ projection.to(inputs.dtype) / inputs.shape[1] ** 0.5
    return torch.cat([inputs, hidden.relu()], dim=-1)


class RidgeSums:
    """Sums over batches that determine ridge regression, in float64.

    Attributes:
        count: Number of rows so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._products: Tensor = torch.zeros(())
        self._crosses: Tensor = torch.zeros(())
        self._squares = self._feature_sums = self._target_sums = torch.zeros(())

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add rows: features (B, F) and targets (B, m), floating point."""
        device = torch.device("cpu") if features.device.type == "mps" else features.device  # MPS has no float64
        features, targets = (tensor.detach().to(device, torch.float64) for tensor in (features, targets))
        zero = not self.count
        self.count += len(features)
        sums = (
            features.T @ features,
            features.T @ targets,
            targets.square().sum(),
            features.sum(0),
            targets.sum(0),
        )
        names = ("_products", "_crosses", "_squares", "_feature_sums", "_target_sums")
        for name, value in zip(names, sums, strict=True):
            setattr(self, name, value if zero else getattr(self, name) + value)

    def __add__(self, other: RidgeSums) -> RidgeSums:
        """Sums over the rows of both; neither may be empty."""
        total = RidgeSums()
        total.count = self.count + other.count
        for name in ("_products", "_crosses", "_squares", "_feature_sums", "_target_sums"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def is_finite(self) -> bool:
        """Whether no row had a NaN or an infinite value; the sums of none are finite."""
        sums = (self._products, self._crosses, self._squares, self._feature_sums, self._target_sums)
        return all(bool(value.isfinite().all()) for value in sums)

    def solve(self, penalties: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """Weight (m, F) and bias (m,) in float64 for each penalty; see `ridge`."""
        mean, target_mean = self._feature_sums / self.count, self._target_sums / self.count
        centered = self._products - self.count * torch.outer(mean, mean)
        crosses = self._crosses - self.count * torch.outer(mean, target_mean)
        values, vectors = torch.linalg.eigh(centered)
        values = values.clamp(min=0)
        rotated = vectors.T @ crosses
        scale = values.mean().clamp(min=torch.finfo(torch.float64).tiny)
        solutions = []
        for penalty in penalties:
            weight = (vectors @ (rotated / (values + penalty * scale).unsqueeze(1))).T
            solutions.append((weight, target_mean - weight @ mean))
        return solutions

    def squared_error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean squared error of `features @ weight.T + bias` over the rows."""
        quadratic = (weight @ self._products * weight).sum() + 2 * (weight @ self._feature_sums * bias).sum()
        linear = (weight * self._crosses.T).sum() + (bias * self._target_sums).sum()
        total = self._squares + quadratic + self.count * bias.square().sum() - 2 * linear
        return float(total) / (self.count * len(bias))


def ridge(features: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    r"""Ridge regression with a bias in closed form, in float64.

    With centered features `X` (N, F) and targets `Y` (N, m), and `lambda = penalty * trace(X^T X) / F`:

        W^T = (X^T X + lambda I)^-1 X^T Y,    b = mean(targets) - W mean(features)

    Args:
        features: (N, F), floating point.
        targets: (N, m), floating point.
        penalty: Above 0, relative to the mean sum of squares of a feature.

    Returns:
        Weight `W` (m, F) and bias `b` (m,), float64.

    Raises:
        InputError: The shapes do not fit, or the penalty is not above 0.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> weight, bias = ridge(x, 2 * x + 1, 1e-9)
        >>> round(weight.item(), 6), round(bias.item(), 6)
        (2.0, 1.0)
    """
    check_features("features", features, features.shape[-1], rows="N", hint="pass a row per image")
    check_features("targets", targets, targets.shape[-1], rows="N", hint="pass a row per image")
    if len(features) != len(targets) or not len(features):
        raise InputError(f"features has {len(features)} rows and targets {len(targets)}: pass as many, at least 1.")
    if not 0 < penalty < float("inf"):
        raise InputError(f"penalty={penalty!r} must be above 0 and finite; 1e-3 is a good start.")
    sums = RidgeSums()
    sums.update(features, targets)
    return sums.solve([penalty])[0]


class RouterFit(NamedTuple):
    """Report of a fit; agreement is measured on images that the measured router was not fitted to, a fifth of all."""

    images: int
    """Number of images."""
    penalty: float
    """Penalty of the ridge regression, the given or the best on held-out images."""
    agreement: float
    """Share of held-out images for which the router selects the same set of groups as the exact query."""
    gaps: Tensor
    """(H,) predicted gap between ranks k and k + 1 of each held-out image; at most 10,000 images."""
    same: Tensor
    """(H,) bool: whether the router selects the same set of groups."""

    def expected(self, margin: float) -> tuple[float, float]:
        """Share of held-out images that take the second pass with this margin, and agreement of the cascade."""
        exact = self.gaps < margin
        return float(exact.float().mean()), float((exact | self.same).float().mean())


def selection_gap(similarity: Tensor, top_k: int) -> Tensor:
    """Difference (B,) between ranks `top_k` and `top_k + 1` of similarities (B, m); infinite if all are selected."""
    if similarity.shape[1] <= top_k:
        return similarity.new_full((len(similarity),), float("inf"))
    top = similarity.topk(top_k + 1, dim=-1).values
    return top[:, -2] - top[:, -1]


def same_groups(first: Tensor, second: Tensor, top_k: int) -> Tensor:
    """Whether two similarities (B, m) select the same set of groups, (B,) bool."""
    chosen = (similarity.topk(top_k, dim=-1).indices.sort(dim=-1).values for similarity in (first, second))
    return torch.eq(*chosen).all(-1)
