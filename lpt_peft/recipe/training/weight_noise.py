"""Gaussian noise on the trained weights while a gradient is computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lpt_peft._random import derive_seed, seeded
from lpt_peft.recipe.settings import TrainSettings
from lpt_peft.recipe.training.average import Values

_STD = 1 / 3  # the clamp to [-1, 1] is at three standard deviations


@torch.no_grad()
def noisy_values(
    parameters: Mapping[str, nn.Parameter], settings: TrainSettings, phase: str, step: int
) -> Values | None:
    """Compute the point at which a step takes its gradient: a random point near the weights.

    With `rho = settings.weight_noise`, for each tensor `w` of N elements:

        eps ~ N(0, 1/9), clamped to [-1, 1], an independent draw for each element
        w'  = w + rho * rms(w) * eps          rms(w) = ||w|| / sqrt(N)
        w  <- w - learning_rate * gradient of the loss at w'

    The mean loss in a neighborhood is lower where the minimum is flat. The neighborhood does not depend on the images,
    so frequent classes do not determine it, and a step costs one forward and backward pass; sharpness-aware
    minimization needs two. `rms(w)` makes rho relative to the weights: prompts enter through a norm, keys and head
    through a cosine, so the scale of these tensors has no meaning. A tensor of zeros gets no noise.

    Source: GNM-PT, Li et al., NeurIPS 2024, arXiv 2410.21042. The scaling by `rms(w)` is ours.

    Args:
        parameters: Trained parameters by name, at w.
        settings: `weight_noise` and `seed` are used.
        phase: Name of the phase, for the seed.
        step: Number of earlier steps, for the seed. All processes and chunks of a step use the same noise.

    Returns:
        w' by name; None without noise.
    """
    if not settings.weight_noise:
        return None
    device = next(iter(parameters.values())).device
    values = {}
    with seeded(derive_seed(settings.seed, phase, "weight noise", step), device):
        for name, weight in parameters.items():
            noise = torch.randn_like(weight).mul_(_STD).clamp_(-1, 1)
            values[name] = weight + settings.weight_noise * weight.square().mean().sqrt() * noise
    return values
