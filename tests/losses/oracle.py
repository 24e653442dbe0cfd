"""Reference implementations of A-GCL and inputs for the tests of the losses."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

COUNTS = [120, 57, 30, 30, 4, 1]
PLAIN_CE = {"margin": 0.0, "noise_scale": 0.0, "gamma_pos": 0.0, "gamma_neg": 0.0, "label_smoothing": 0.0}
BRANCHES = {"balanced": {"gamma_pos": 0.0, "gamma_neg": 4.0}, "instance": {"gamma_pos": 0.5, "gamma_neg": 8.0}}


class Output(NamedTuple):
    logits: torch.Tensor
    similarity: torch.Tensor


def plain_agcl(logits, target, delta, noise, *, s=20.0, mu=0.1, nu=0.5, gamma_pos=0.0, gamma_neg=4.0, a=0.1):
    """Losses (B,) by the equations of docs/how-to/choose-a-loss.md, for autograd in float64."""
    y = F.one_hot(target, len(delta)).to(logits.dtype)
    z = logits - s * (nu * noise.abs() * delta + mu * y)
    p = z.softmax(dim=1)
    w = torch.where(y > 0, (1 - p) ** gamma_pos, p**gamma_neg)
    return -(((1 - a) * y + a / len(delta)) * w * p.log()).sum(dim=1)


def plain_delta(counts, normalize=True):
    logs = [math.log(max(counts)) - math.log(n) for n in counts]
    largest = max(logs) if normalize and max(logs) > 0 else 1.0
    return torch.tensor([value / largest for value in logs], dtype=torch.float64)


def scalar_agcl(logits, y, delta, noise, *, gamma_pos, gamma_neg):
    """Loss of a single image, computed with Python floats."""
    z = [
        x - 20 * (0.5 * abs(e) * d + (0.1 if j == y else 0))
        for j, (x, e, d) in enumerate(zip(logits, noise, delta, strict=True))
    ]
    total = sum(math.exp(v) for v in z)
    loss = 0.0
    for j, v in enumerate(z):
        p = math.exp(v) / total
        weight = (1 - p) ** gamma_pos if j == y else p**gamma_neg
        loss -= ((0.9 if j == y else 0.0) + 0.1 / len(z)) * weight * math.log(p)
    return loss


def batch(rows=16, *, dtype=torch.float64):
    """Logits of cosines in (-0.6, 0.6), labels, clamped noise."""
    generator = torch.Generator().manual_seed(0)
    logits = 20 * (1.2 * torch.rand(rows, len(COUNTS), generator=generator, dtype=torch.float64) - 0.6)
    target = torch.randint(len(COUNTS), (rows,), generator=generator)
    noise = (torch.randn(rows, len(COUNTS), generator=generator, dtype=torch.float64) / 3).clamp(-1, 1)
    return logits.to(dtype), target, noise


def with_gradient(function, logits):
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf)
    loss.sum().backward()
    return loss.detach(), leaf.grad
