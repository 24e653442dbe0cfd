"""Initializes the head of a run from another prompt file, class by class."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from lpt_peft._text import printable
from lpt_peft.errors import ConfigError
from lpt_peft.heads import CosineClassifier

_MAX_NAMES = 5  # in a message


@torch.no_grad()
def copy_head_rows(
    head: CosineClassifier, class_names: Sequence[str], weight: Tensor, names: Sequence[str] | None
) -> str:
    """Copy the rows of classes with equal names, in place; rows of all other classes are left unchanged.

    Names are compared after NFC normalization, so that a letter with an accent equals a letter and a combining accent.

    Args:
        head: Of the run, weight (C, d).
        class_names: (C,) classes of the run.
        weight: (C', d) head of the prompt file.
        names: (C',) classes of the prompt file; None if it has no names.

    Returns:
        A sentence that states which rows were copied, which classes are new and which were dropped.

    Raises:
        ConfigError: The widths differ.

    Example:
        >>> head = CosineClassifier(4, 3)
        >>> print(copy_head_rows(head, ["bee", "cat", "ant"], torch.eye(4)[:2], ["ant", "bee"]))
        The head starts with the known rows of 2 classes; 1 class is new: cat
        >>> head.weight[0].tolist()
        [0.0, 1.0, 0.0, 0.0]
    """
    if weight.shape[1] != head.weight.shape[1]:
        raise ConfigError(
            f"The head rows of the prompt file have width {weight.shape[1]}, those of the run {head.weight.shape[1]}: "
            "they belong to different backbones."
        )
    if names is None:
        return "The prompt file has no class names, so all rows of the head are new"
    known = {unicodedata.normalize("NFC", name): row for row, name in enumerate(names)}
    rows = [known.pop(unicodedata.normalize("NFC", name), None) for name in class_names]
    for label, row in enumerate(rows):
        if row is not None:
            head.weight[label] = weight[row].to(head.weight)
    new = [name for name, row in zip(class_names, rows, strict=True) if row is None]
    if len(new) == len(rows):
        return "The prompt file has none of the classes, so all rows of the head are new"
    kept = len(rows) - len(new)
    text = f"The head starts with the known rows of {kept} class{'es' if kept > 1 else ''}"
    text += f"; {_classes(new, 'new')}" if new else ""
    return text + (f"; {_classes(list(known), 'not used')}" if known else "")


def _classes(names: Sequence[str], state: str) -> str:
    few = ", ".join(printable(name) for name in names[:_MAX_NAMES])
    verb = "class is" if len(names) == 1 else "classes are"
    return f"{len(names)} {verb} {state}: {few}{', ...' if len(names) > _MAX_NAMES else ''}"
