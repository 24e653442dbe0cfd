"""Validation of numbers."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

from lpt_peft.errors import ConfigError


def checked_integer(
    name: str, value: Any, low: int, high: int | None = None, error: type[ValueError] = ConfigError
) -> int:
    """Check an integer from `low` to `high` and return it as int; a boolean is not an integer."""
    bound = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < low or (high is not None and number > high):
        raise error(f"{name}={value!r:.100} must be {bound}.")
    return number


def is_finite_number(value: Any) -> bool:
    """Whether a value is a finite Python or NumPy number; booleans and tensors are not."""
    number: Any = value  # Real has no arithmetic for mypy
    # torch.compile cannot trace math.isfinite
    return isinstance(value, Real) and not isinstance(value, bool) and bool(abs(number) < math.inf)
