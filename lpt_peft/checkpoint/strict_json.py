"""Strict JSON: how prompt files are parsed, and the canonical form they are written in.

`json.loads` takes NaN, the last of two equal keys, integers of any length and nesting up to the
interpreter's stack. A file from anyone may not. Not here: which keys there must be (`schema.py`).
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from typing import Any

from lpt_peft.errors import PromptFileFormatError

MAX_DEPTH = 32
_STRUCTURE = re.compile(r'\\.|["\[\]{}]', re.DOTALL)


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Canonical JSON: sorted keys, no escapes for non-ASCII text, so that equal content is equal text.

    Raises:
        ValueError: NaN, infinity or a circular reference.
        TypeError: Something JSON has no type for.

    Example:
        >>> dumps({"b": [1, 2.0], "a": None})
        '{"a":null,"b":[1,2.0]}'
    """
    separators = (",", ":") if indent is None else None
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)


def loads(data: bytes, source: str) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: UTF-8 without a byte-order mark.
        source: What the bytes are, for messages.

    Raises:
        PromptFileFormatError: Not an object, not UTF-8 (lone surrogates included), a key twice, NaN or infinity,
            an integer beyond 64 bits, nesting deeper than 32, or text behind the object.

    Example:
        >>> loads(b'{"top_k": 2}', "config.json")
        {'top_k': 2}
        >>> loads(b'{"top_k": 2, "top_k": 3}', "config.json")
        Traceback (most recent call last):
        lpt_peft.errors.PromptFileFormatError: config.json is not strict JSON: the key 'top_k' appears twice. ...
    """
    try:
        value = parse(data)
    except (ValueError, RecursionError) as error:
        raise PromptFileFormatError(
            f"{source} is not strict JSON: {error}. It is damaged or not of this library; save or fetch it anew."
        ) from error
    if not isinstance(value, dict):
        raise PromptFileFormatError(f"{source} must hold a JSON object, not {reprlib.repr(value)}.")
    return value


def parse(data: bytes) -> Any:
    """Any JSON value by the same rules; a broken one is a plain ValueError."""
    text = data.decode("utf-8")
    _check_depth(text)
    value = json.loads(text, object_pairs_hook=_unique, parse_int=_whole, parse_float=_finite, parse_constant=_constant)
    # Escapes such as "\ud800" parse to text that no UTF-8 file can hold again.
    dumps(value).encode("utf-8")
    return value


def _check_depth(text: str) -> None:
    # Before parsing: the parser recurses, and the caller may have raised the recursion limit.
    depth, quoted = 0, False
    for match in _STRUCTURE.finditer(text):
        mark = match[0]
        if mark == '"':
            quoted = not quoted
        elif not quoted and mark in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"nesting deeper than {MAX_DEPTH}")
        elif not quoted and mark in "]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {reprlib.repr(key)} appears twice")
        result[key] = value
    return result


def _whole(digits: str) -> int:
    # 20 characters hold every 64-bit integer; longer ones are not even converted.
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"the integer {reprlib.repr(digits)} does not fit 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {reprlib.repr(digits)} is not finite")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
