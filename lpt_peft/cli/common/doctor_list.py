"""The support table of `lpt-peft doctor --list`: which models take prompts, found by trying each.

Not here: one model in detail (`doctor.py`), and where the names come from (`lpt_peft.backbones.listing`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import NamedTuple

from tqdm import tqdm

from lpt_peft.backbones import listing as catalog
from lpt_peft.errors import InputError

WORKS = "yes"


class Line(NamedTuple):
    """One line of the table: models of one family with one answer."""

    library: str
    family: str
    models: int
    example: str
    answer: str
    """WORKS, or why not."""


def show_support(pattern: str, *, as_json: bool) -> None:
    """Print the answer for every model that fits the pattern, or for every family where there is none.

    Raises:
        InputError: No model fits.
    """
    answers = survey(pattern or "*")
    if not answers:
        raise InputError(f'No installed library has a model that fits "{pattern}"; try "*{pattern.strip("*")}*".')
    if as_json:
        print(json.dumps([{"name": entry.title, "answer": answer} for entry, answer in answers], indent=2))
    elif pattern:
        for entry, answer in answers:
            print(f"{entry.title}: {answer}")
    else:
        for line in families(answers):
            print(f"{line.library}, {line.family}: {line.models} models such as {line.example}: {line.answer}")
    works = sum(answer == WORKS for _, answer in answers)
    print(f"{works} of {len(answers)} take prompts.", file=sys.stderr)


def survey(pattern: str) -> list[tuple[catalog.Entry, str]]:
    """Every model that fits the pattern, with WORKS or the reason why not."""
    chosen = [entry for entry in catalog.entries() if any(fnmatch(n, pattern) for n in (entry.path, entry.name))]
    bar = tqdm(chosen, unit="model", disable=None, file=sys.stderr)
    return [(entry, catalog.refusal(entry) or WORKS) for entry in bar]


def families(answers: Iterable[tuple[catalog.Entry, str]]) -> list[Line]:
    """One line for each family and answer, those that work first, by library."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for entry, answer in answers:
        groups.setdefault((entry.library, entry.family, answer), []).append(entry.title)
    lines = [Line(library, family, len(names), names[0], answer) for (library, family, answer), names in groups.items()]
    return sorted(lines, key=lambda line: (line.library != "timm", line.library, line.answer != WORKS, -line.models))
