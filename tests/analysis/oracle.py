"""Random features with classes of different sizes."""

from __future__ import annotations

import torch


def clusters(rows=200, width=12, classes=5, seed=0, spread=1.0, dtype=torch.float32):
    """Features (rows, width) around class centers, with long-tailed labels that contain every class."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.5 ** torch.arange(classes, dtype=torch.float64)
    labels = torch.multinomial(weights, rows, replacement=True, generator=generator)
    labels[:classes] = torch.arange(classes)
    centers = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return (centers[labels] + spread * noise).to(dtype), labels
