"""Class names and training counts on the card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lpt_peft.config import PromptMetadata
from lpt_peft.hub.card.markdown import code, percent, table

_MOST_ROWS = 40
_SHOWN = 10  # of more classes: the most frequent, and the rarest
_MOST_CHARACTERS = 60


def classes_section(metadata: PromptMetadata, details: Mapping[str, Any] | None) -> Iterator[str]:
    """A table of the classes, or of the most frequent and the rarest; nothing if neither names nor counts are known.

    Args:
        metadata: Names and counts.
        details: Of `results_of_split`; adds the accuracy of each class.
    """
    names, counts = metadata.label_names, metadata.class_counts
    size = len(names or counts or ())
    if not size:
        return
    order = list(range(size))
    if counts is not None:
        order.sort(key=lambda label: -counts[label])
    first, last = (order, []) if size <= _MOST_ROWS else (order[:_SHOWN], order[-_SHOWN:])
    text = f"{size:,} classes"
    if counts is not None:
        text += f" with {sum(counts):,} training images, from {min(counts):,} to {max(counts):,} in a class"
        if last:
            text += f". The table shows the {_SHOWN} most frequent and the {_SHOWN} rarest"
    elif last:
        text += f", of which the table shows the first {_SHOWN} and the last {_SHOWN}"
    yield f"{text}. The label is the index in the logits."
    header = ["label", *(["class"] if names else []), *(["training images"] if counts is not None else [])]
    header += ["accuracy in %", "95 % interval", f"{details['split']} images"] if details else []

    def row(label: int) -> list[str]:
        cells = [str(label)]
        cells += [code(names[label], _MOST_CHARACTERS)] if names else []
        cells += [f"{counts[label]:,}"] if counts is not None else []
        return cells + (_accuracy(details["classes"][label]) if details else [])

    gap = [["…"] * len(header)] if last else []
    yield table(header, [*map(row, first), *gap, *map(row, last)])


def _accuracy(row: Mapping[str, Any]) -> list[str]:
    accuracy, low, high = (None if row[name] is None else percent(row[name]) for name in ("accuracy", "low", "high"))
    return [accuracy or "-", f"{low} to {high}" if low and high else "-", f"{row['images']:,}"]
