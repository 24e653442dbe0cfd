"""Detects a model that only predicts rare classes: the collapse of A-GCL at too high a learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MIN_IMAGES = 50  # of an epoch, for a reliable share
_RATIO = 0.25  # of the images' share


class RarePredictionMonitor:
    """Compares predictions with labels on the instance-balanced half of training batches.

    Frequent classes are the smallest set, by number of images, that covers at least half of the training images. In a
    collapsed run almost no prediction names them. Counts stay on the device until `check`.

    Args:
        labels: Class of every training image.
        num_classes: Of the head.
        device: Of logits and targets.

    Example:
        >>> monitor = RarePredictionMonitor([0] * 90 + [1] * 10, 2, torch.device("cpu"))
        >>> logits = torch.tensor([[0.0, 1.0]]).expand(100, 2)  # always class 1
        >>> monitor.update(logits, torch.tensor([0] * 90 + [1] * 10))
        >>> monitor.check()
        (0.0, 0.9, 1)
    """

    def __init__(self, labels: Sequence[int], num_classes: int, device: torch.device) -> None:
        counts = torch.bincount(torch.as_tensor(labels), minlength=num_classes)
        order = counts.argsort(descending=True, stable=True)
        self.num_frequent = int((counts[order].cumsum(0) * 2 < counts.sum()).sum()) + 1
        self._chance = self.num_frequent / num_classes
        self._frequent = torch.zeros(num_classes, dtype=torch.bool)
        self._frequent[order[: self.num_frequent]] = True
        self._frequent = self._frequent.to(device)
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # predicted frequent, frequent, all

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            logits: (B, C).
            target: Labels (B,).
        """
        predicted, labelled = self._frequent[logits.argmax(1)].sum(), self._frequent[target].sum()
        self._counts += torch.stack([predicted, labelled, torch.full_like(labelled, len(target))])

    def check(self) -> tuple[float, float, int] | None:
        """Evaluate and reset the counts; reads from the device.

        Returns:
            The share of frequent classes among predictions, their share among images, and their number, if the first
            is less than a quarter of the second and less than half of that of random guesses; otherwise None.
        """
        predicted, labelled, images = self._counts.tolist()
        self._counts.zero_()
        if images < _MIN_IMAGES or predicted >= min(_RATIO * labelled, self._chance / 2 * images):
            return None
        return predicted / images, labelled / images, self.num_frequent
