"""Parsing of the words of a sub-command by tyro, with short messages for flags that it does not have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import partial, wraps
from typing import Any, get_type_hints

import tyro


def parse(name: str, command: Callable[..., Any], words: Sequence[str]) -> tuple[Callable[[], Any], list[str]]:
    """Return the call of a sub-command, and messages about unknown words; call it only if there are none.

    Args:
        name: Of the sub-command.
        command: Function whose arguments are parsed.
        words: After the name of the sub-command.

    Raises:
        SystemExit: tyro has printed the help, or has refused the words.
    """

    @wraps(command)
    def deferred(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return partial(command, *args, **kwargs)

    call, unknown = tyro.cli(deferred, prog=f"lpt-peft {name}", args=words, return_unknown_args=True)
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if unknown and not flags:
        return call, [f"Unexpected argument {unknown[0]!r:.100}: see lpt-peft {name} --help."]
    known = list(_flags(_keywords(command))) if flags else []
    problems = [f"{name} has no flag {flag:.100}.{_suggestion(flag, known)}" for flag in flags]
    if problems:
        problems[-1] += f" All flags: lpt-peft {name} --help."
    return call, problems


def _suggestion(flag: str, known: Sequence[str]) -> str:
    """Similar flags of the sub-command, as a question; those of a group may be given without its name."""
    spellings: dict[str, list[str]] = {}
    for name in known:
        for spelling in {name.lstrip("-"), name.lstrip("-").rpartition(".")[2]}:
            spellings.setdefault(spelling, []).append(name)
    similar = get_close_matches(flag.lstrip("-").replace("_", "-"), spellings, 1, 0.75)
    return f" Did you mean {' or '.join(spellings[similar[0]])}?" if similar else ""


def _keywords(command: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the arguments that are given as flags."""
    hints, parameters = get_type_hints(command, include_extras=True), inspect.signature(command).parameters
    return {name: hints[name] for name, parameter in parameters.items() if parameter.kind != parameter.POSITIONAL_ONLY}


def _flags(hints: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    for name, hint in hints.items():
        kind, names = hint, [name]
        if hasattr(hint, "__metadata__"):  # Annotated; tyro.conf.arg(name=...) renames a flag
            kind = hint.__origin__
            names += [renamed for part in hint.__metadata__ if (renamed := getattr(part, "name", None)) is not None]
        if is_dataclass(kind):
            yield from _flags(
                get_type_hints(kind, include_extras=True), f"{prefix}{names[-1]}." if names[-1] else prefix
            )
        else:
            yield f"{prefix}{names[-1].replace('_', '-')}"
