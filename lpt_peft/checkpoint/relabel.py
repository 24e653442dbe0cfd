"""Head rows for other classes, matched by class name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lpt_peft._text import difference, look_alike, normalize_name, number, printable
from lpt_peft.checkpoint.content import PromptContent
from lpt_peft.errors import InputError
from lpt_peft.heads import CosineClassifier

_MOST_NAMES = 10


class LabelChanges(NamedTuple):
    """Classes of a head before and after `relabel`."""

    rows: tuple[int | None, ...]
    """For each new class, its row before; None for a class whose row is new."""
    kept: tuple[str, ...]
    """Classes whose trained rows are kept."""
    new: tuple[str, ...]
    """Classes with new, untrained rows."""
    dropped: tuple[str, ...]
    """Classes of the file without a counterpart; their rows are lost."""

    def __str__(self) -> str:
        """The changes in a few sentences."""
        text = f"The head keeps the trained rows of {number(len(self.kept), 'class')}."
        if self.new:
            text += f" New, not trained yet: {_list(self.new)}."
        if self.dropped:
            text += f" In the file, but not used: {_list(self.dropped)}."
        pairs = [(old, new) for old in self.dropped for new in self.new if look_alike(old, new)]
        for old, new in pairs[:_MOST_NAMES]:
            text += f" {old!r} of the file looks like {new!r}, but {difference(old, new)}."
        return text


def relabel(content: PromptContent, label_names: Sequence[str]) -> tuple[PromptContent, LabelChanges]:
    """Give prompts a head for other classes: rows of classes with the same name are kept, other rows are new.

    Names are compared in Unicode normalization form C. New rows are drawn as in a new head, without advancing torch's
    random state. The metadata follows: class counts are kept if every class has a count, training record and
    temperature only if the classes are the same.

    Args:
        content: Prompts whose file names its classes.
        label_names: (C,) names of the new classes, different from each other.

    Returns:
        The prompts with the new head, and the changes.

    Raises:
        InputError: The file does not name its classes, or names two of them alike.
    """
    names = content.metadata.label_names
    if names is None:
        raise InputError(
            "The prompt file does not name its classes, so its head rows cannot be matched with label_names. Leave "
            'label_names out to load the head as it is, or load only the shared prompts: part="shared".'
        )
    old = {normalize_name(name): row for row, name in enumerate(names)}
    if len(old) < len(names):
        repeated = next(name for row, name in enumerate(names) if old[normalize_name(name)] != row)
        raise InputError(
            f"The prompt file names several classes {printable(repeated, 80)!r}, so its head rows cannot be matched "
            "with label_names. Leave label_names out to load the head as it is."
        )
    rows = [old.get(normalize_name(name)) for name in label_names]
    used = {row for row in rows if row is not None}
    changes = LabelChanges(
        rows=tuple(rows),
        kept=tuple(name for name, row in zip(label_names, rows, strict=True) if row is not None),
        new=tuple(name for name, row in zip(label_names, rows, strict=True) if row is None),
        dropped=tuple(name for row, name in enumerate(names) if row not in used),
    )
    return _with_rows(content, label_names, changes), changes


def _with_rows(content: PromptContent, label_names: Sequence[str], changes: LabelChanges) -> PromptContent:
    weight = content.tensors["head.weight"]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        head = CosineClassifier(weight.shape[1], len(label_names), content.config.logit_scale).weight.to(weight.dtype)
        for label, row in enumerate(changes.rows):
            if row is not None:
                head[label] = weight[row]
    metadata, same_classes = content.metadata, not changes.new and not changes.dropped
    counts = metadata.class_counts
    known = [counts[row] for row in changes.rows if row is not None] if counts is not None else []
    return replace(
        content,
        config=replace(content.config, num_classes=len(label_names)),
        tensors={**content.tensors, "head.weight": head.detach()},
        metadata=replace(
            metadata,
            label_names=tuple(label_names),
            class_counts=tuple(known) if len(known) == len(label_names) else None,
            training=metadata.training if same_classes else {},
            temperature=metadata.temperature if same_classes else None,
        ),
    )


def _list(names: Sequence[str]) -> str:
    first = ", ".join(repr(printable(name, 80)) for name in names[:_MOST_NAMES])
    return first if len(names) <= _MOST_NAMES else f"{first}, ... ({number(len(names), 'class')})"
