"""Rules that compose into the schema of parsed JSON: `record({"size": whole(0)})` and the like.

A rule is a function of a value and its path; it returns nothing or raises `BrokenRule` with a message that
begins with the path. Not here: the prompt file's own keys (`schema.py`).
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[Any, str], None]


class BrokenRule(ValueError):  # noqa: N818 - never leaves the package: callers turn it into an LPTError
    """A value breaks a rule."""


def record(rules: Mapping[str, Rule]) -> Rule:
    """An object with exactly these keys.

    Example:
        >>> record({"size": whole(0)})({"size": True}, "weights")
        Traceback (most recent call last):
        lpt_peft.checkpoint.rules.BrokenRule: weights.size=True must be a whole number of at least 0
    """

    def check(value: Any, path: str) -> None:
        require(isinstance(value, dict), value, path, "an object")
        if value.keys() != rules.keys():
            unknown, missing = sorted(value.keys() - rules.keys()), sorted(rules.keys() - value.keys())
            raise BrokenRule(
                f"{path or 'the top level'} has unknown key(s) {reprlib.repr(unknown)} and lacks {missing}; an unknown "
                "key might change the meaning of the rest, so none is skipped"
            )
        for key, rule in rules.items():
            rule(value[key], f"{path}.{key}" if path else key)

    return check


def table(rule: Rule, most: int) -> Rule:
    """An object with at most `most` keys of the writer's choice, each 1 to 256 characters, and such values."""

    def check(value: Any, path: str) -> None:
        require(isinstance(value, dict) and len(value) <= most, value, path, f"an object of at most {most} keys")
        for key, item in value.items():
            require(1 <= len(key) <= 256, key, f"a key of {path}", "1 to 256 characters")
            rule(item, f"{path}.{key}")

    return check


def items(rule: Rule, low: int, high: int) -> Rule:
    """A list of `low` to `high` such values."""

    def check(value: Any, path: str) -> None:
        fits = isinstance(value, list) and low <= len(value) <= high
        require(fits, value, path, f"a list of {low} to {high}" if low != high else f"a list of {low}")
        for index, item in enumerate(value):
            rule(item, f"{path}[{index}]")

    return check


def nullable(rule: Rule) -> Rule:
    """null, or such a value."""

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


def whole(low: int, high: int | None = None) -> Rule:
    """A whole number from `low` to `high`; a boolean is none."""

    def check(value: Any, path: str) -> None:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
        fits = fits and (high is None or value <= high)
        require(fits, value, path, f"a whole number of at least {low}" + ("" if high is None else f", at most {high}"))

    return check


def number(value: Any, path: str) -> None:
    """A finite number; a boolean is none."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    require(fits, value, path, "a finite number")


def positive(value: Any, path: str) -> None:
    """A finite number greater than 0."""
    number(value, path)
    require(value > 0, value, path, "greater than 0")


def primitive(value: Any, path: str) -> None:
    """A boolean, a number, text of at most 1024 characters, or a list of at most 64 such."""
    for item in value if isinstance(value, list) and len(value) <= 64 else [value]:
        fits = isinstance(item, (bool, int, float)) or (isinstance(item, str) and len(item) <= 1024)
        require(fits, value, path, "a boolean, a number, a short text, or a short list of these")


def require(fits: bool, value: Any, path: str, rule: str) -> None:
    """Raise `BrokenRule` unless `fits`."""
    if not fits:
        raise BrokenRule(f"{path}={reprlib.repr(value)} must be {rule}")
