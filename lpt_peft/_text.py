"""Text from untrusted sources in messages, and comparison of names."""

from __future__ import annotations

import unicodedata
from itertools import zip_longest

_CONTROL_CATEGORIES = frozenset(("Cc", "Cs"))
_REPLACED_CATEGORIES = _CONTROL_CATEGORIES | {"Zl", "Zp"}
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


def control_character(name: str) -> str | None:
    r"""The first control character or surrogate of a name as "U+0007", None if there is none.

    Example:
        >>> control_character("a\tb"), control_character("\u0645\u06cc\u200c\u062e")
        ('U+0009', None)
    """
    found = next((c for c in name if unicodedata.category(c) in _CONTROL_CATEGORIES), None)
    return None if found is None else _code(found)


def normalize_name(name: str) -> str:
    """The form in which names are compared, NFC: a letter and its accent are a single character where possible."""
    return unicodedata.normalize("NFC", name)


def look_alike(first: str, second: str) -> bool:
    """Whether two names differ only in case, spaces, invisible characters or forms of the same characters."""
    return name_skeleton(first) == name_skeleton(second)


def difference(first: str, second: str) -> str:
    r"""Describe the first character in which two different names differ.

    Example:
        >>> difference("guinea pig", "guinea\u00a0pig")
        'character 7 is U+0020 SPACE in the first and U+00A0 NO-BREAK SPACE in the second'
    """
    pairs = enumerate(zip_longest(normalize_name(first), normalize_name(second)), start=1)
    position, (left, right) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
    return f"character {position} is {_describe(left)} in the first and {_describe(right)} in the second"


def name_skeleton(name: str) -> str:
    """The form in which names that `look_alike` are equal."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return "".join(c for c in folded if unicodedata.category(c) not in {"Cf", "Zs"})


def _rewrites_terminal(character: str) -> bool:
    if unicodedata.category(character) in _REPLACED_CATEGORIES:
        return True
    return unicodedata.bidirectional(character) in _BIDI_CONTROLS


def _describe(character: str | None) -> str:
    return "missing" if character is None else f"{_code(character)} {unicodedata.name(character, '')}".strip()


def _code(character: str) -> str:
    return f"U+{ord(character):04X}"


def number(count: int, noun: str) -> str:
    """A count and its noun.

    Example:
        >>> number(1, "epoch"), number(2, "class"), number(0, "process")
        ('1 epoch', '2 classes', '0 processes')
    """
    plural = noun if count == 1 else f"{noun}{'es' if noun.endswith('s') else 's'}"
    return f"{count} {plural}"
