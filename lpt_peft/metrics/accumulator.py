"""Accumulation of the metrics over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from torch import Tensor

from lpt_peft.errors import ConfigError, InputError, StateError
from lpt_peft.metrics.checks import Counts, as_integers, first_true
from lpt_peft.metrics.result import Average, ShotResult, check_average, shot_metrics
from lpt_peft.metrics.shot_rules import SHOT_RULES, ShotRule

BINS = 15
UNIT = 2**32  # confidences are summed as integers in units of 2^-32, so that the sum does not depend on the order


class ShotMetrics:
    """Metrics of a test set, accumulated batch by batch.

    `compute()` returns a `ShotResult` at any time. All counters are int64 and on the CPU, so results are bitwise equal
    for any batching, order or sharding of the images. For logits on another device, only predictions and confidences
    are kept. They are transferred and checked together when results are requested, so `update` does not synchronize.

    Args:
        class_counts: Training images per class, (C,) integers of at least 0; or a mapping from label to count.
        many, few, few_inclusive, many_inclusive: The thresholds of `ShotRule`, by default those of the published LPT
            results; `from_rule` accepts the names of the published rules.
        average: "class" or "image": how `overall`, `many`, `medium` and `few` are averaged.

    Raises:
        InputError: The counts are empty, negative, not integers or not one-dimensional.
        ConfigError: The thresholds overlap, or `average` is unknown.

    Example:
        >>> metrics = ShotMetrics(class_counts=[500, 50, 5])
        >>> metrics
        ShotMetrics(num_classes=3, many: n > 100, medium: 20 < n <= 100, few: n <= 20, average='class')
        >>> metrics.update(torch.tensor([[9.0, 0, 0], [0, 9, 0], [9, 0, 0], [0, 0, 9]]), torch.tensor([0, 1, 2, 2]))
        >>> result = metrics.compute()
        >>> result.many, result.medium, result.few, result.accuracy
        (1.0, 1.0, 0.5, 0.75)
    """

    def __init__(
        self,
        class_counts: Counts,
        *,
        many: int = 100,
        few: int = 20,
        few_inclusive: bool = True,
        many_inclusive: bool = False,
        average: Average = "class",
    ) -> None:
        check_average(average)
        self.rule = ShotRule(many=many, few=few, many_inclusive=many_inclusive, few_inclusive=few_inclusive)
        self.average = average
        self.class_counts = as_integers("class_counts", class_counts)
        self.reset()

    @classmethod
    def from_rule(cls, name: str, class_counts: Counts, *, average: Average = "class") -> ShotMetrics:
        """Create metrics with a published rule of `SHOT_RULES`: "lpt" (the default), "lift" or "oltr".

        Raises:
            ConfigError: The name is unknown.
        """
        if name not in SHOT_RULES:
            raise ConfigError(
                f"Shot rule {name!r} is unknown: pass {', '.join(SHOT_RULES)}, or the thresholds many= and few=."
            )
        return cls(class_counts, average=average, **asdict(SHOT_RULES[name]))

    def __repr__(self) -> str:
        """Show sizes and rule without computing results."""
        return f"{type(self).__name__}(num_classes={len(self.class_counts)}, {self.rule}, average={self.average!r})"

    def reset(self) -> None:
        """Reset all counters."""
        # Concatenated: correct (C), total (C), and images, correct images and summed confidences per bin.
        self._counters = torch.zeros(2 * len(self.class_counts) + 3 * BINS, dtype=torch.int64, device="cpu")
        self._synced = False
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, logits: Tensor | Sequence[int], target: Tensor | Sequence[int]) -> None:
        """Count a batch. An invalid batch changes nothing.

        Args:
            logits: (B, C) of any floating-point dtype and device; half precision is converted to float32. -inf masks a
                class. For probabilities, pass their logarithm. Predicted labels, (B,) integers, are also accepted but
                give no calibration error.
            target: True labels, (B,) integers from 0 to C - 1.

        Raises:
            InputError: A shape or dtype is wrong, a label is out of range, or the softmax of a row is undefined. For
                logits that are not on the CPU, the last error is raised when results are requested, and all batches
                since the previous request are discarded.
        """
        if isinstance(getattr(logits, "logits", None), Tensor):
            raise InputError(f"logits is of type {type(logits).__name__}, not a tensor: pass output.logits.")
        size = len(self.class_counts)
        truth = as_integers("target", target, size)
        confidence = None
        if isinstance(logits, Tensor) and logits.is_floating_point():
            predicted, confidence = predict_labels(logits, size)
        else:
            predicted = as_integers("logits", logits, size)
        if len(predicted) != len(truth):
            raise InputError(
                f"logits has {len(predicted)} rows, but target has {len(truth)} labels: pass a label for each row."
            )
        if confidence is not None and not _on_host(confidence):
            self._pending.append((predicted, confidence, truth))
            return
        self._count(predicted, confidence, truth)

    def _count_pending(self) -> None:
        """Transfer, check and count the pending batches."""
        if self._pending:
            predicted, confidence, truth = (torch.cat(tensors) for tensors in zip(*self._pending, strict=True))
            self._pending = []
            self._count(predicted.cpu(), confidence.cpu(), truth)

    def _count(self, predicted: Tensor, confidence: Tensor | None, truth: Tensor) -> None:
        size = len(self.class_counts)
        if confidence is not None and confidence.isnan().any():
            raise InputError(
                f"logits[{first_true(confidence.isnan())}] contains NaN or +inf, or only -inf, so its softmax is "
                "undefined: check the model for overflow (float16?), or pass finite rows only."
            )
        hit = predicted == truth
        bins = 0 if confidence is None else calibration_counters(confidence, hit)
        self._counters[:size] += torch.bincount(truth[hit], minlength=size)
        self._counters[size : 2 * size] += torch.bincount(truth, minlength=size)
        self._counters[2 * size :] += bins

    def __call__(self, logits: Tensor | Sequence[int], target: Tensor | Sequence[int]) -> None:
        """Call `update`."""
        self.update(logits, target)

    def compute(self) -> ShotResult:
        """Compute the metrics of all images counted by this process or, after `sync`, by all processes."""
        self._count_pending()
        size = len(self.class_counts)
        correct, total, bins = self._counters[:size], self._counters[size : 2 * size], self._counters[2 * size :]
        result = shot_metrics(correct, total, self.class_counts, self.rule, self.average)
        images, hits, confidence = bins.view(3, BINS)
        if result.num_images == 0 or images.sum() < result.num_images:
            return result
        gaps = (hits - confidence.double() / UNIT).abs()
        return replace(result, expected_calibration_error=float(gaps.sum() / result.num_images))

    def merge(self, other: ShotMetrics) -> ShotMetrics:
        """Add the images counted by `other` and return self. Rule and average of self are kept.

        Raises:
            InputError: `other` is not a ShotMetrics, or its class counts differ.
        """
        if not isinstance(other, ShotMetrics) or not torch.equal(self.class_counts, other.class_counts):
            raise InputError(
                "other must be a ShotMetrics with the same class_counts: create both from the same counts."
            )
        self._count_pending()
        other._count_pending()
        self._counters = self._counters + other._counters
        self._synced = self._synced or other._synced
        return self

    def sync(self, group: dist.ProcessGroup | None = None) -> ShotMetrics:
        """Replace the counters with their sum over all processes and return self; without processes, do nothing.

        Every process must call this method, once per evaluation. Images that a distributed sampler repeats to make the
        ranks equally long are counted twice: evaluate with a sampler that does not pad.

        Raises:
            StateError: The counters are already summed, so images would be counted twice.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return self
        if self._synced:
            raise StateError("sync() was already called on these counters: call reset() before the next evaluation.")
        self._count_pending()
        backend = dist.get_backend(group)
        device = "cuda" if "nccl" in backend and "gloo" not in backend else "cpu"  # NCCL cannot reduce CPU tensors
        counters = self._counters.to(device, copy=True)
        dist.all_reduce(counters, group=group)
        self._counters, self._synced = counters.cpu(), True
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of `class_counts` and `counters` (int64) and of `synced` (bool)."""
        self._count_pending()
        state = {"class_counts": self.class_counts, "counters": self._counters, "synced": torch.tensor(self._synced)}
        return {name: tensor.clone() for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the counters from `state_dict()`. An invalid state changes nothing.

        Raises:
            InputError: Names, shapes, dtypes or class counts differ.
        """
        expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.state_dict().items()}
        if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise InputError(
                f"state must contain tensors named {', '.join(expected)}: pass the result of state_dict()."
            )
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        if found != expected:
            raise InputError(f"state must contain {expected}, not {found}: pass a state_dict() of as many classes.")
        if not torch.equal(state["class_counts"].cpu(), self.class_counts):
            raise InputError(
                "state has different class_counts: create this ShotMetrics with the class_counts of the saved metrics."
            )
        self._counters, self._synced = state["counters"].to("cpu", copy=True), bool(state["synced"])
        self._pending = []


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def predict_labels(logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return predicted labels (B,) int64 and confidences (B,) on the device; NaN where the softmax is undefined.

    Args:
        logits: (B, `size`), floating point.
        size: Number of classes.

    Raises:
        InputError: The shape is wrong.
    """
    if logits.ndim != 2 or logits.shape[1] != size:
        raise InputError(
            f"logits must be (B, {size}), with a column per entry of class_counts, not {tuple(logits.shape)}: "
            f"pass the model's raw output, or predicted labels as integers (B,)."
        )
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
    return logits.argmax(dim=1), probabilities.amax(dim=1)


def calibration_counters(confidence: Tensor, hit: Tensor) -> Tensor:
    """Images, correct images and summed confidence in `UNIT` of every bin (a, b]: (3 * BINS,) int64."""
    # Edges in the dtype of the confidences, so that 1/3 equals 5/15 and the bins are closed above exactly.
    edges = torch.arange(1, BINS + 1, dtype=confidence.dtype, device="cpu") / BINS
    index = torch.bucketize(confidence.clamp(max=1), edges)
    images, hits = torch.bincount(index, minlength=BINS), torch.bincount(index[hit], minlength=BINS)
    units = (confidence.double() * UNIT).round().long()
    return torch.cat([images, hits, torch.zeros_like(images).index_add_(0, index, units)])
