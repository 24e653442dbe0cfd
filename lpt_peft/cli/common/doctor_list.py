"""The support table of `lpt-peft doctor --list`: which models take prompts, found by trying each.

Not here: a single model in detail (`cli/doctor.py`), and the names of the models (`lpt_peft.backbones.listing`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import NamedTuple

from tqdm import tqdm

from lpt_peft.backbones import listing
from lpt_peft.cli.common.streams import print_json, print_text
from lpt_peft.errors import InputError

WORKS = "yes"


class Line(NamedTuple):
    """A line of the table: the models of a family that have the same answer."""

    library: str
    family: str
    models: int
    example: str
    answer: str
    """WORKS, or the reason of the refusal."""


def print_support(pattern: str, *, as_json: bool) -> None:
    """Print the answer for every model that matches the pattern, or for every family if the pattern is empty.

    Raises:
        InputError: No model matches.
    """
    answers = survey(pattern or "*")
    if not answers:
        raise InputError(f'No installed library has a model that matches "{pattern}"; try "*{pattern.strip("*")}*".')
    if as_json:
        print_json([{"name": entry.title, "answer": answer} for entry, answer in answers])
    elif pattern:
        for entry, answer in answers:
            print_text(f"{entry.title}: {answer}")
    else:
        for line in families(answers):
            print_text(f"{line.library}, {line.family}: {line.models} models such as {line.example}: {line.answer}")
    works = sum(answer == WORKS for _, answer in answers)
    print(f"{works} of {len(answers)} take prompts.", file=sys.stderr)


def survey(pattern: str) -> list[tuple[listing.Entry, str]]:
    """Every model that matches the pattern, with WORKS or the reason of its refusal."""
    chosen = [entry for entry in listing.entries() if any(fnmatch(n, pattern) for n in (entry.path, entry.name))]
    bar = tqdm(chosen, unit="model", disable=None, file=sys.stderr)
    return [(entry, listing.refusal(entry) or WORKS) for entry in bar]


def families(answers: Iterable[tuple[listing.Entry, str]]) -> list[Line]:
    """A line for each family and answer, by library, the supported models first."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for entry, answer in answers:
        groups.setdefault((entry.library, entry.family, answer), []).append(entry.title)
    lines = [Line(library, family, len(names), names[0], answer) for (library, family, answer), names in groups.items()]
    return sorted(lines, key=lambda line: (line.library != "timm", line.library, line.answer != WORKS, -line.models))
