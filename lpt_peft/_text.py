"""Text from untrusted sources in messages."""

from __future__ import annotations

import unicodedata

_REPLACED_CATEGORIES = frozenset(("Cc", "Cs", "Zl", "Zp"))
_BIDI_CONTROLS = frozenset(("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"))


def printable(text: object, most: int = 300, replacement: str = "\N{REPLACEMENT CHARACTER}") -> str:
    """Return a text as one short line without characters that could rewrite a terminal.

    Joiners, unusual spaces and private-use characters stay: names in Persian, Hindi or Japanese need them.

    Args:
        text: Any object; `str` of it is used.
        most: Characters to keep.
        replacement: Stands for control characters, surrogates, line separators and marks of text direction.
    """
    return "".join(replacement if _rewrites_terminal(c) else c for c in str(text)[:most])


def _rewrites_terminal(character: str) -> bool:
    return (
        unicodedata.category(character) in _REPLACED_CATEGORIES
        or unicodedata.bidirectional(character) in _BIDI_CONTROLS
    )
