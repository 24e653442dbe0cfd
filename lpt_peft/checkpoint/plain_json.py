"""Search for the entry of a value that plain JSON cannot hold, for messages."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

_MOST_NESTED = 64  # levels that are searched; circular references end here


def broken_entry(value: Any, path: str = "", depth: int = 0) -> str | None:
    """Return path, value and reason of the first entry that is not plain JSON, None if there is none.

    Example:
        >>> broken_entry({"training": {"lr": [0.1, float("nan")]}})
        'training.lr[1]=nan must be plain JSON, which has finite numbers only'
    """
    if depth > _MOST_NESTED:
        return None
    if isinstance(value, Mapping):
        if (found := _broken_key(value, path)) is not None:
            return found
        entries = ((f"{path}.{key}" if path else str(key), item) for key, item in value.items())
        return next((e for place, item in entries if (e := broken_entry(item, place, depth + 1))), None)
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
        return next((e for index, item in items if (e := broken_entry(item, f"{path}[{index}]", depth + 1))), None)
    reason = _reason(value)
    return f"{path}={reprlib.repr(value)} {reason}" if reason else None


def _broken_key(value: Mapping[Any, Any], path: str) -> str | None:
    keys = list(value)
    if any(not isinstance(key, str) for key in keys) and len({type(key) for key in keys}) > 1:
        return f"{path}={reprlib.repr(dict(value))} must be plain JSON, whose keys are text: convert the keys by str()"
    for key in keys:
        if not isinstance(key, (str, int, float, type(None))):
            return f"a key of {path}={key!r:.100} must be plain JSON, whose keys are text: convert it by str()"
        if isinstance(key, str) and (reason := _lone_surrogate(key)):
            return f"a key of {path}={key!r:.100} {reason}"
    return None


def _reason(value: Any) -> str | None:
    if isinstance(value, str):
        return _lone_surrogate(value)
    if value is None or isinstance(value, (bool, int)):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else "must be plain JSON, which has finite numbers only"
    cure = ": pass .item() or .tolist()" if hasattr(value, "tolist") else ""
    return f"must be plain JSON, which has no {type(value).__name__}{cure}"


def _lone_surrogate(text: str) -> str | None:
    found = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    if found is None:
        return None
    return (
        f"must be plain JSON, which has no surrogates (U+{ord(found):04X}): they stand for bytes that are not UTF-8. "
        "Remove them"
    )
