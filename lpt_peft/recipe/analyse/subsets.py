"""Subsets of images: evenly over classes, and those of the classes that a model has."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lpt_peft.analysis import ClassMatch, match_classes
from lpt_peft.data.images import LabelledImages
from lpt_peft.errors import InputError


def stratified_indices(labels: Sequence[int], most: int) -> list[int]:
    """Choose at most `most` images in ascending order: as many of each class as fit, evenly spaced.

    If there are more classes than images to choose, an image of evenly spaced classes is chosen.

    Example:
        >>> stratified_indices([0, 0, 0, 0, 1, 2], 4)
        [0, 2, 4, 5]
    """
    if len(labels) <= most:
        return list(range(len(labels)))
    classes = torch.as_tensor(labels)
    counts = torch.bincount(classes)
    cap, high = 0, int(counts.max())
    while cap < high:  # the largest cap for which the classes fit
        middle = (cap + high + 1) // 2
        if int(counts.clamp(max=middle).sum()) <= most:
            cap = middle
        else:
            high = middle - 1
    order = classes.argsort(stable=True)
    groups = order.split(counts.tolist())
    if cap == 0:
        present = [group for group in groups if len(group)]
        return sorted(int(present[index][0]) for index in torch.linspace(0, len(present) - 1, most).long().tolist())
    kept: list[int] = []
    for group in groups:
        size = min(cap, len(group))
        kept += group[torch.arange(size) * len(group) // max(size, 1)].tolist()
    return sorted(kept)


def matched_images(images: LabelledImages, class_names: Sequence[str]) -> tuple[LabelledImages, ClassMatch]:
    """Select the images of the classes that a model has; they keep the labels of `images`.

    Args:
        images: A shifted test set, with its own classes.
        class_names: Classes of the model.

    Raises:
        InputError: No class matches, or the classes that match have no image.
    """
    match = match_classes(images.class_names, class_names)
    kept = [index for index, label in enumerate(images.labels) if match.indices[label] is not None]
    if not kept:
        raise InputError("The classes that the model has contain no image: add images, or name the folders by class.")
    return images.subset(kept, allow_empty=True), match
