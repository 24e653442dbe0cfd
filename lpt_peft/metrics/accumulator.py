"""ShotMetrics: counts batches and processes, then asks `shot_metrics` for the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from torch import Tensor

from lpt_peft.errors import ConfigError, InputError, StateError
from lpt_peft.metrics.checks import as_integers, first_true
from lpt_peft.metrics.result import Average, ShotResult, check_average, shot_metrics
from lpt_peft.metrics.rules import SHOT_RULES, ShotRule

_BINS = 15
_UNIT = 2**32  # confidences are summed as integers, in units of 2^-32: such a sum does not depend on its order


class ShotMetrics:
    """Counts a test set batch by batch; `compute()` gives a `ShotResult` at any time.

    All counters are int64 and stay on the CPU: results are the same to the last digit however the images are batched,
    ordered or sharded. Of logits on another device only predictions and confidences are kept, and they are fetched and
    checked all at once, when the figures are asked for: so `update` does not wait for the device.

    Args:
        class_counts: Training images per class, (C,) integers of at least 0.
        many, few, few_inclusive, many_inclusive: The thresholds of `ShotRule`; `from_rule` has the published ones.
        average: "class" or "image": how `overall`, `many`, `medium` and `few` are averaged.

    Raises:
        InputError: The counts are empty, negative, not integers or not one-dimensional.
        ConfigError: The thresholds overlap, or `average` is unknown.

    Example:
        >>> metrics = ShotMetrics(class_counts=[500, 50, 5])
        >>> metrics
        ShotMetrics(num_classes=3, many: n > 100, medium: 20 <= n <= 100, few: n < 20, average='class')
        >>> metrics.update(torch.tensor([[9.0, 0, 0], [0, 9, 0], [9, 0, 0], [0, 0, 9]]), torch.tensor([0, 1, 2, 2]))
        >>> result = metrics.compute()
        >>> result.many, result.medium, result.few, result.accuracy
        (1.0, 1.0, 0.5, 0.75)
    """

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        *,
        many: int = 100,
        few: int = 20,
        few_inclusive: bool = False,
        many_inclusive: bool = False,
        average: Average = "class",
    ) -> None:
        check_average(average)
        self.rule = ShotRule(many=many, few=few, many_inclusive=many_inclusive, few_inclusive=few_inclusive)
        self.average = average
        self.class_counts = as_integers("class_counts", class_counts)
        self.reset()

    @classmethod
    def from_rule(cls, name: str, class_counts: Tensor | Sequence[int], *, average: Average = "class") -> ShotMetrics:
        """Build with a published rule of `SHOT_RULES`: "lift" (the default one), "oltr" or "lpt".

        Raises:
            ConfigError: No rule has this name.
        """
        if name not in SHOT_RULES:
            raise ConfigError(f"Shot rule {name!r} is unknown; pass {', '.join(SHOT_RULES)}, or many= and few=.")
        return cls(class_counts, average=average, **asdict(SHOT_RULES[name]))

    def __repr__(self) -> str:
        """Sizes and rule; nothing is counted for it."""
        return f"{type(self).__name__}(num_classes={len(self.class_counts)}, {self.rule}, average={self.average!r})"

    def reset(self) -> None:
        """Forget all images."""
        # One vector holds all: correct (C), total (C), and per confidence bin images, correct, sum of confidences.
        self._counters = torch.zeros(2 * len(self.class_counts) + 3 * _BINS, dtype=torch.int64, device="cpu")
        self._synced = False
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, logits: Tensor | Sequence[int], target: Tensor | Sequence[int]) -> None:
        """Count a batch; of a refused batch nothing is counted.

        Args:
            logits: (B, C) of any float dtype and device; half precision is read as float32. -inf masks a class; for
                probabilities pass their logarithm. Or predicted labels, (B,) integers, which give no calibration error.
            target: True labels, (B,) integers from 0 to C - 1.

        Raises:
            InputError: A shape or dtype is another, a label is out of range, or a row of logits has no softmax. For
                logits on another device than the CPU the last of these is raised when the figures are asked for, and
                none of the batches since then is counted.
        """
        size = len(self.class_counts)
        truth = as_integers("target", target, size)
        confidence = None
        if isinstance(logits, Tensor) and logits.is_floating_point():
            predicted, confidence = _predict(logits, size)
        else:
            predicted = as_integers("logits", logits, size)
        if len(predicted) != len(truth):
            raise InputError(f"logits has {len(predicted)} rows, target {len(truth)} labels; pass one label per row.")
        if confidence is not None and not _on_host(confidence):
            self._pending.append((predicted, confidence, truth))
            return
        self._count(predicted, confidence, truth)

    def _settle(self) -> None:
        """Fetch, check and count the batches that are still on their device."""
        if self._pending:
            predicted, confidence, truth = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
            self._pending = []
            self._count(predicted.cpu(), confidence.cpu(), truth)

    def _count(self, predicted: Tensor, confidence: Tensor | None, truth: Tensor) -> None:
        size = len(self.class_counts)
        if confidence is not None and confidence.isnan().any():
            raise InputError(
                f"logits[{first_true(confidence.isnan())}] holds NaN or +inf, or nothing but -inf, so it has no "
                "softmax. Look for overflow in the model (float16?), or pass only finite rows."
            )
        hit = predicted == truth
        bins = 0 if confidence is None else _calibration_counters(confidence, hit)
        self._counters[:size] += torch.bincount(truth[hit], minlength=size)
        self._counters[size : 2 * size] += torch.bincount(truth, minlength=size)
        self._counters[2 * size :] += bins

    def __call__(self, logits: Tensor | Sequence[int], target: Tensor | Sequence[int]) -> None:
        """The same as `update`."""
        self.update(logits, target)

    def compute(self) -> ShotResult:
        """The figures of all images that this process has counted, or that all have, after `sync`."""
        self._settle()
        size = len(self.class_counts)
        correct, total, bins = self._counters[:size], self._counters[size : 2 * size], self._counters[2 * size :]
        result = shot_metrics(correct, total, self.class_counts, self.rule, self.average)
        images, hits, confidence = bins.view(3, _BINS)
        if result.num_images == 0 or images.sum() < result.num_images:
            return result
        gaps = (hits - confidence.double() / _UNIT).abs()
        return replace(result, expected_calibration_error=float(gaps.sum() / result.num_images))

    def merge(self, other: ShotMetrics) -> ShotMetrics:
        """Add the images counted by `other`; returns self, whose rule and average stay.

        Raises:
            InputError: `other` is no ShotMetrics, or has other class counts.
        """
        if not isinstance(other, ShotMetrics) or not torch.equal(self.class_counts, other.class_counts):
            raise InputError("other must be a ShotMetrics with the same class_counts; build both from the same counts.")
        self._settle()
        other._settle()
        self._counters = self._counters + other._counters
        self._synced = self._synced or other._synced
        return self

    def sync(self, group: dist.ProcessGroup | None = None) -> ShotMetrics:
        """Replace the counters by their sum over all processes; does nothing outside torch.distributed. Returns self.

        Every process must call it, once per evaluation. An image that a distributed sampler repeats to even out the
        ranks counts twice: evaluate with one that does not pad.

        Raises:
            StateError: The counters are such a sum already, so images would be counted twice.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return self
        if self._synced:
            raise StateError("sync() was called on these counters already; call reset() before the next evaluation.")
        self._settle()
        backend = dist.get_backend(group)
        device = "cuda" if "nccl" in backend and "gloo" not in backend else "cpu"  # NCCL reduces no CPU tensors
        counters = self._counters.to(device, copy=True)
        dist.all_reduce(counters, group=group)
        self._counters, self._synced = counters.cpu(), True
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of `class_counts` and `counters` (int64) and of `synced` (bool)."""
        self._settle()
        state = {"class_counts": self.class_counts, "counters": self._counters, "synced": torch.tensor(self._synced)}
        return {name: tensor.clone() for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict()`; a refused one changes nothing.

        Raises:
            InputError: Names, shapes or dtypes differ, or it belongs to other class counts.
        """
        expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.state_dict().items()}
        if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise InputError(f"state must hold tensors named {', '.join(expected)}: pass a state_dict().")
        given = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        if given != expected:
            raise InputError(f"state must hold {expected}, not {given}; pass a state_dict() of as many classes.")
        if not torch.equal(state["class_counts"].cpu(), self.class_counts):
            raise InputError("state has other class_counts; build this ShotMetrics with those of the saved one.")
        self._counters, self._synced = state["counters"].to("cpu", copy=True), bool(state["synced"])
        self._pending = []


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _predict(logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Predicted labels (B,) int64 and confidences (B,) float, NaN where a row has no softmax; on the logits' device."""
    if logits.ndim != 2 or logits.shape[1] != size:
        raise InputError(
            f"logits must be (B, {size}), a column per entry of class_counts, not {tuple(logits.shape)}. "
            f"Pass the model's raw output, or predicted labels as integers (B,)."
        )
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
    return logits.argmax(dim=1), probabilities.amax(dim=1)


def _calibration_counters(confidence: Tensor, hit: Tensor) -> Tensor:
    """Per bin (a, b] the images, the correct ones and the summed confidence in `_UNIT`: (3 * _BINS,) int64."""
    # Edges in the confidence's own dtype: 1/3 and 5/15 are then the same number, and the bins closed above exactly.
    edges = torch.arange(1, _BINS + 1, dtype=confidence.dtype, device="cpu") / _BINS
    place = torch.bucketize(confidence.clamp(max=1), edges)
    images, hits = torch.bincount(place, minlength=_BINS), torch.bincount(place[hit], minlength=_BINS)
    units = (confidence.double() * _UNIT).round().long()
    return torch.cat([images, hits, torch.zeros_like(images).index_add_(0, place, units)])
