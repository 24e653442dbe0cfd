"""Spherical k-means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def spherical_kmeans(points: Tensor, size: int, generator: torch.Generator, iterations: int) -> Tensor:
    """Cluster unit points (N, d) into unit centers (size, d): k-means++, then Lloyd iterations on the sphere."""
    first = int(torch.randint(len(points), (), generator=generator))
    centers = points[first : first + 1]
    while len(centers) < size:
        # Squared distance on the sphere is 2 (1 - cos). Rounding must not allow drawing the same point twice.
        gap = (1 - (points @ centers.T).amax(1)).cpu().double()
        gap[gap < 1e-7] = 0
        if not bool(gap.any()):
            gap = (points[:, None] != centers).any(-1).all(1).cpu().double()
        pick = int(torch.multinomial(gap, 1, generator=generator))
        centers = torch.cat([centers, points[pick : pick + 1]])
    assignment = torch.full((len(points),), -1, device=points.device)
    for _ in range(iterations):
        nearest = (points @ centers.T).argmax(1)
        if torch.equal(nearest, assignment):
            break
        assignment = nearest
        sums = torch.zeros_like(centers).index_add_(0, assignment, points)
        # A center without points, or whose points cancel, does not move.
        moved = sums.norm(dim=-1, keepdim=True) > 1e-6
        centers = torch.where(moved, F.normalize(sums, dim=-1), centers)
    return centers
