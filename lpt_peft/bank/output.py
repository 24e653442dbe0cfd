"""Results of a bank: padded tensors of the batch, and a prediction per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

from torch import Tensor

from lpt_peft.bank.tables import numbers_of
from lpt_peft.checkpoint import PromptContent
from lpt_peft.config import Phase


class TaskPrediction(NamedTuple):
    """Result of one image."""

    task: str | None
    """Name of the task; None for the plain model."""
    logits: Tensor
    """(C,) float32 or float64, with the classes of the task; (0,) for the plain model, which has no classes here."""
    features: Tensor
    """(feature_dim,) input of the classifier."""
    groups: Tensor
    """(k,) int64 selected groups; (0,) without groups."""
    label_names: tuple[str, ...] | None
    """Names of the C classes, if the prompt file has them."""
    temperature: float
    """Divisor of the logits that calibrates the probabilities; 1 if the prompt file has none."""
    digest: str = ""
    """Of the version of the task that answered, see `PromptBank.describe`; "" for the plain model."""

    @property
    def probabilities(self) -> Tensor:
        """(C,) `softmax(logits / temperature)`."""
        return (self.logits / self.temperature).softmax(-1)


class TaskFacts(NamedTuple):
    """What a result needs of a task, from its prompt file."""

    name: str | None
    num_classes: int
    top_k: int
    label_names: tuple[str, ...] | None
    temperature: float
    digest: str = ""


class TaskInfo(NamedTuple):
    """A task and its current version."""

    name: str
    digest: str
    """Of the prompt file; equal prompts with equal metadata have the same."""
    num_classes: int
    label_names: tuple[str, ...] | None
    temperature: float | None
    """Divisor of the logits that calibrates the probabilities; None if the prompt file has none."""
    preprocess: dict[str, Any]
    """How images become tensors, for `lpt_peft.data.transforms`."""
    phase: Phase
    pinned: bool
    in_slot: bool
    """Whether it is in a slot; otherwise only in CPU memory."""


PLAIN = TaskFacts(None, 0, 0, None, 1.0)
"""Facts of the plain model."""


def facts_of(name: str, digest: str, content: PromptContent) -> TaskFacts:
    """Return the facts of a task from its prompt file."""
    metadata, top_k = content.metadata, numbers_of(content).top_k
    temperature = metadata.temperature or 1.0
    return TaskFacts(name, content.config.num_classes, top_k, metadata.label_names, temperature, digest)


def info_of(name: str, digest: str, content: PromptContent, *, pinned: bool, in_slot: bool) -> TaskInfo:
    """Describe a version of a task."""
    metadata, num_classes = content.metadata, content.config.num_classes
    labels = (num_classes, metadata.label_names, metadata.temperature)
    return TaskInfo(name, digest, *labels, {**content.preprocess}, content.phase, pinned, in_slot)


@dataclass(frozen=True, eq=False)
class BankOutput(Sequence[TaskPrediction]):
    """Results of a batch of B images: a sequence of `TaskPrediction`.

    Attributes:
        logits: (B, C) float32 or float64, C of the largest task of the batch; -inf beyond the classes of an image's
            task.
        features: (B, feature_dim) inputs of the classifiers.
        groups: (B, k) int64 with padding; valid up to the `top_k` of an image's task.
        facts: For each image, its task.
    """

    logits: Tensor
    features: Tensor
    groups: Tensor
    facts: tuple[TaskFacts, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.facts)

    @overload
    def __getitem__(self, index: int) -> TaskPrediction: ...

    @overload
    def __getitem__(self, index: slice) -> list[TaskPrediction]: ...

    def __getitem__(self, index: int | slice) -> TaskPrediction | list[TaskPrediction]:
        """Return the prediction of an image, with the number of classes of its task."""
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        facts = self.facts[index]
        return TaskPrediction(
            facts.name,
            self.logits[index, : facts.num_classes],
            self.features[index],
            self.groups[index, : facts.top_k],
            facts.label_names,
            facts.temperature,
            facts.digest,
        )

    def cpu(self) -> BankOutput:
        """Copy all tensors to the CPU at once."""
        return replace(self, logits=self.logits.cpu(), features=self.features.cpu(), groups=self.groups.cpu())
