"""Markdown in which text of a file cannot become structure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lpt_peft._text import printable


def line(text: str) -> str:
    """One short line, so that text of the file cannot become structure of the card."""
    return printable(text, replacement=" ").strip()


def code(text: object, most: int = 300) -> str:
    """A code span of limited length, in which HTML and Markdown have no meaning."""
    plain = line(str(text)).replace("`", " ").replace("|", " ").strip()
    return "`" + ((plain if len(plain) <= most else f"{plain[: most - 1]}…") or " ") + "`"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the cells must not contain line breaks or "|"."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    return "\n".join([first, "|" + "---|" * len(header), *others])


def percent(share: float) -> str:
    """A number from 0 to 1 in percent."""
    return f"{100 * share:.1f}"
