"""Text of unknown origin in messages."""

from __future__ import annotations


def printable(text: object, most: int = 300, instead: str = "\N{REPLACEMENT CHARACTER}") -> str:
    """Return a text of unknown origin as one short printable line; other characters could rewrite a terminal."""
    return "".join(c if c.isprintable() else instead for c in str(text)[:most])
