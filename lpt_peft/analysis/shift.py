"""Accuracy that is kept on a shifted test set, classes matched by name; synthetic shifts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt_peft._numbers import is_finite_number
from lpt_peft._text import name_skeleton, normalize_name
from lpt_peft.analysis._inputs import check_correct
from lpt_peft.errors import ConfigError, InputError


class ClassMatch(NamedTuple):
    """Classes of a shifted test set, by name, among those of a model."""

    indices: tuple[int | None, ...]
    """For each class of the test set its index in the model; None if the model does not have it."""
    unmatched: tuple[str, ...]
    """Classes of the test set that the model does not have."""
    missing: tuple[str, ...]
    """Classes of the model that the test set does not have."""


class Shift(NamedTuple):
    """Mean accuracy over the classes that both test sets have, as fractions; None without such classes."""

    classes: int
    """Classes with images in both test sets."""
    images: int
    """Shifted images of these classes."""
    original: float | None
    """Accuracy on the original images of these classes."""
    shifted: float | None
    """Accuracy on the shifted images."""
    lost: float | None
    """`original - shifted`."""
    kept: float | None
    """`shifted / original`; None if `original` is 0."""


def match_classes(names: Sequence[str], model_names: Sequence[str]) -> ClassMatch:
    """Match classes by name. Case, spaces and invisible characters do not count, unless classes differ only in them.

    Args:
        names: Classes of the shifted test set.
        model_names: Classes of the model.

    Raises:
        InputError: A name is given twice, or no class matches.

    Example:
        >>> match_classes(["Dog", "zebra"], ["cat", "dog"])
        ClassMatch(indices=(1, None), unmatched=('zebra',), missing=('cat',))
    """
    key = name_skeleton
    if any(len({key(name) for name in group}) < len(group) for group in (names, model_names)):
        key = normalize_name
    own = {key(name): index for index, name in enumerate(model_names)}
    found = [key(name) for name in names]
    for argument, group, unique in (("model_names", model_names, own), ("names", names, set(found))):
        if len(unique) < len(group):
            raise InputError(f"{argument} has a name twice, so classes cannot be matched by name: rename one of them.")
    indices = tuple(own.get(name) for name in found)
    if all(index is None for index in indices):
        raise InputError(
            f"None of the classes {_first(names)} is a class of the model, {_first(model_names)}: name the folders of "
            "the shifted images like the classes."
        )
    present = set(indices)
    return ClassMatch(
        indices,
        tuple(name for name, index in zip(names, indices, strict=True) if index is None),
        tuple(name for index, name in enumerate(model_names) if index not in present),
    )


def accuracy_shift(correct: Any, total: Any, shifted_correct: Any, shifted_total: Any) -> Shift:
    """Compare the accuracy on a test set with that on a shifted test set, over the classes with images in both.

    A shifted set that lacks hard classes would otherwise look robust. Both accuracies are means over classes.

    Args:
        correct: Correct images of each class of the model on the original test set (C,), integers.
        total: Images of each class there (C,).
        shifted_correct: Correct images of each class on the shifted test set (C,).
        shifted_total: Images of each class there (C,).

    Raises:
        InputError: The counts are invalid, or of different numbers of classes.

    Example:
        >>> accuracy_shift([8, 1], [10, 10], [4, 0], [10, 0])
        Shift(classes=1, images=10, original=0.8, shifted=0.4, lost=0.4, kept=0.5)
    """
    before, after = check_correct(correct, total), check_correct(shifted_correct, shifted_total)
    if len(before[0]) != len(after[0]):
        raise InputError(
            f"correct has {len(before[0])} classes and shifted_correct {len(after[0])}: count both by the classes of "
            "the model."
        )
    shared = (before[1] > 0) & (after[1] > 0)
    if not bool(shared.any()):
        return Shift(0, 0, None, None, None, None)
    original, shifted = (float((right.double() / images)[shared].mean()) for right, images in (before, after))
    kept = shifted / original if original else None
    return Shift(int(shared.sum()), int(after[1][shared].sum()), original, shifted, original - shifted, kept)


def add_noise(images: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise to images (B, 3, H, W) with values from 0 to 1, and clamp them to 0 and 1.

    Args:
        images: Floating point.
        std: Standard deviation; Hendrycks & Dietterich (ICLR 2019, arXiv 1903.12261) use 0.08 to 0.38.
        generator: On the CPU, so that devices give the same images.

    Raises:
        ConfigError: `std` is negative or not a number.
        InputError: `images` is not (B, channels, H, W) floating point.
    """
    _check_images(images, "std", std)
    noise = torch.randn(images.shape, generator=generator).to(images)
    return (images + std * noise).clamp(0, 1)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Blur images (B, channels, H, W) with a Gaussian; borders are repeated.

    Args:
        images: Floating point.
        sigma: Standard deviation in pixels; 0 returns the images.

    Raises:
        ConfigError: `sigma` is negative or not a number.
        InputError: `images` is not (B, channels, H, W) floating point.
    """
    _check_images(images, "sigma", sigma)
    radius = math.ceil(3 * sigma)
    if radius == 0:
        return images
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernel = (-0.5 * (offsets / sigma).square()).exp()
    kernel = (kernel / kernel.sum()).to(images.dtype)
    channels = images.shape[1]
    padded = F.pad(images, (radius, radius, radius, radius), mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def _check_images(images: Tensor, name: str, strength: float) -> None:
    if not is_finite_number(strength) or strength < 0:
        raise ConfigError(f"{name}={strength!r} must be a number of at least 0.")
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise InputError("images must be floating point (B, channels, H, W): pass a batch of image tensors.")


def _first(names: Sequence[str]) -> str:
    return ", ".join(repr(name)[:100] for name in names[:3]) + (", ..." if len(names) > 3 else "")
