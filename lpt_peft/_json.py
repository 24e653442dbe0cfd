"""Strict parsing and validation of JSON from untrusted sources, and its canonical form.

`json.loads` accepts NaN, duplicate keys (the last value wins), integers of any length and nesting up to the
interpreter's stack; `loads` does not. A `Rule` validates a parsed value: rules compose, as in
`object_of({"size": integer(0)})`.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from lpt_peft.errors import LPTError

MAX_DEPTH = 32
_STRUCTURE = re.compile(r'\\.|["\[\]{}]', re.DOTALL)

Rule = Callable[[Any, str], None]
"""Function of a value and its path; raises `BrokenRule`, whose message begins with the path."""


class BrokenRule(ValueError):  # noqa: N818 - internal: callers convert it to an LPTError
    """A value breaks a rule."""


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Serialize to canonical JSON: sorted keys and no escapes for non-ASCII text, so equal content is equal text.

    Raises:
        ValueError: NaN, infinity or a circular reference.
        TypeError: A type that JSON does not have.

    Example:
        >>> dumps({"b": [1, 2.0], "a": None})
        '{"a":null,"b":[1,2.0]}'
    """
    separators = (",", ":") if indent is None else None
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)


def loads(data: bytes, source: str, error: type[LPTError]) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: UTF-8 without a byte-order mark.
        source: Name of the input in messages.
        error: Class of the error to raise.

    Raises:
        LPTError: Of class `error`: not an object, not UTF-8 (lone surrogates included), a duplicate key, NaN or
            infinity, an integer beyond 64 bits, nesting deeper than 32, or text after the object.

    Example:
        >>> from lpt_peft.errors import ConfigError
        >>> loads(b'{"top_k": 2}', "config.json", ConfigError)
        {'top_k': 2}
        >>> loads(b'{"top_k": 2, "top_k": 3}', "config.json", ConfigError)
        Traceback (most recent call last):
        lpt_peft.errors.ConfigError: config.json is not strict JSON: the key 'top_k' appears twice. ...
    """
    try:
        value = parse(data)
    except (ValueError, RecursionError) as cause:
        raise error(
            f"{source} is not strict JSON: {cause}. It is damaged, or another program wrote it; save or fetch it again."
        ) from cause
    if not isinstance(value, dict):
        raise error(f"{source} must hold a JSON object, not {reprlib.repr(value)}.")
    return value


def parse(data: bytes) -> Any:
    """Parse any JSON value by the same rules; invalid input raises a plain ValueError."""
    text = data.decode("utf-8")
    _check_depth(text)
    value = json.loads(text, object_pairs_hook=_unique, parse_int=_int64, parse_float=_finite, parse_constant=_constant)
    # Escapes such as "\ud800" parse to text that cannot be encoded as UTF-8 again.
    dumps(value).encode("utf-8")
    return value


def object_of(rules: Mapping[str, Rule], optional: Mapping[str, Rule] | None = None) -> Rule:
    """An object with exactly these keys, and any of the optional keys.

    Example:
        >>> object_of({"size": integer(0)})({"size": True}, "tensor")
        Traceback (most recent call last):
        lpt_peft._json.BrokenRule: tensor.size=True must be an integer of at least 0
    """
    known = {**rules, **(optional or {})}

    def check(value: Any, path: str) -> None:
        require(isinstance(value, dict), value, path, "an object")
        unknown, missing = sorted(value.keys() - known.keys()), sorted(rules.keys() - value.keys())
        if unknown or missing:
            raise BrokenRule(
                f"{path or 'the top level'} has unknown key(s) {reprlib.repr(unknown)} and lacks {missing}; an unknown "
                "key might change the meaning of the rest, so it is not skipped"
            )
        for key, rule in known.items():
            if key in value:
                rule(value[key], f"{path}.{key}" if path else key)

    return check


def mapping_of(rule: Rule, most: int) -> Rule:
    """An object of at most `most` free keys, each of 1 to 256 characters, whose values follow `rule`."""

    def check(value: Any, path: str) -> None:
        require(isinstance(value, dict) and len(value) <= most, value, path, f"an object of at most {most} keys")
        for key, item in value.items():
            require(1 <= len(key) <= 256, key, f"a key of {path}", "1 to 256 characters")
            rule(item, f"{path}.{key}")

    return check


def list_of(rule: Rule, low: int, high: int) -> Rule:
    """A list of `low` to `high` values that follow `rule`."""

    def check(value: Any, path: str) -> None:
        fits = isinstance(value, list) and low <= len(value) <= high
        require(fits, value, path, f"a list of {low} to {high}" if low != high else f"a list of {low}")
        for index, item in enumerate(value):
            rule(item, f"{path}[{index}]")

    return check


def nullable(rule: Rule) -> Rule:
    """null, or a value that follows `rule`."""

    def check(value: Any, path: str) -> None:
        if value is not None:
            rule(value, path)

    return check


def one_of(*allowed: str) -> Rule:
    """One of these texts."""

    def check(value: Any, path: str) -> None:
        require(isinstance(value, str) and value in allowed, value, path, " or ".join(f'"{a}"' for a in allowed))

    return check


def text(value: Any, path: str) -> None:
    """Text of 1 to 1024 characters."""
    require(isinstance(value, str) and 1 <= len(value) <= 1024, value, path, "text of 1 to 1024 characters")


def sha256(value: Any, path: str) -> None:
    """A sha256 in lower-case hexadecimal digits."""
    fits = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
    require(bool(fits), value, path, "64 lower-case hexadecimal digits")


def boolean(value: Any, path: str) -> None:
    """True or false."""
    require(isinstance(value, bool), value, path, "true or false")


def integer(low: int, high: int | None = None) -> Rule:
    """An integer from `low` to `high`; a boolean does not count as an integer."""

    def check(value: Any, path: str) -> None:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
        fits = fits and (high is None or value <= high)
        require(fits, value, path, f"an integer of at least {low}" + ("" if high is None else f", at most {high}"))

    return check


def number(value: Any, path: str) -> None:
    """A finite number; a boolean does not count as a number."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    require(fits, value, path, "a finite number")


def positive(value: Any, path: str) -> None:
    """A finite number greater than 0."""
    number(value, path)
    require(value > 0, value, path, "greater than 0")


def primitive(value: Any, path: str) -> None:
    """A boolean, a number, text of at most 1024 characters, or a list of at most 64 of these."""
    for item in value if isinstance(value, list) and len(value) <= 64 else [value]:
        fits = isinstance(item, (bool, int, float)) or (isinstance(item, str) and len(item) <= 1024)
        require(fits, value, path, "a boolean, a number, a short text, or a short list of these")


def require(fits: bool, value: Any, path: str, rule: str) -> None:
    """Raise `BrokenRule` unless `fits`."""
    if not fits:
        raise BrokenRule(f"{path}={reprlib.repr(value)} must be {rule}")


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


def _int64(digits: str) -> int:
    # 20 characters hold every 64-bit integer; longer text is not converted at all.
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


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects by dotted name; an empty object is a value.

    Example:
        >>> flatten({"loss": "lpt", "shared": {"epochs": 40}})
        {'loss': 'lpt', 'shared.epochs': 40}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
