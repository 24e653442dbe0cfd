"""Training settings on the card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lpt_peft._json import flatten
from lpt_peft._version import __version__
from lpt_peft.hub.card.markdown import code, table

_MOST_ROWS = 100
_ALWAYS = {
    *(f"{phase}.{name}" for phase in ("shared", "group") for name in ("epochs", "learning_rate")),
    *("batch_size", "group.pool_learning_rate", "loss", "method", "optimizer", "phases", "sampling", "seed"),
}
"""Settings that are shown even if they have their defaults."""
_USED_OF_GROUP = {"joint": ("group.pool_learning_rate",), "shared": ()}
"""Settings of `group` that a run uses, for phases in which it is not a phase."""


def recipe_section(recipe: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> Iterator[str]:
    """A table of settings; those of a phase are named `shared.epochs`.

    Args:
        recipe: Settings of a run, plain JSON.
        defaults: Their defaults. Most settings that equal them are left out; None shows all.
    """
    rows = flatten(recipe)
    if (used := _USED_OF_GROUP.get(str(recipe.get("phases")))) is not None:
        rows = {name: value for name, value in rows.items() if not name.startswith("group.") or name in used}
    known = flatten(defaults or {})
    kept = [
        name for name in sorted(rows) if name in _ALWAYS or name not in known or not _equal(rows[name], known[name])
    ]
    cells = [[code(name), code(rows[name])] for name in kept[:_MOST_ROWS]]
    header = ["setting", "value"]
    if defaults is not None:
        header.append("default")
        for name, row in zip(kept, cells, strict=False):
            row.append(code(known[name]) if name in known else "-")
    yield table(header, cells)
    if omitted := len(rows) - len(kept):
        yield f"The other {omitted} settings have the defaults of lpt_peft {__version__}."
    if len(kept) > _MOST_ROWS:
        yield f"{len(kept) - _MOST_ROWS} more settings are in the prompt file."


def _equal(first: Any, second: Any) -> bool:
    """Equality of JSON values, in which True is not 1."""
    return isinstance(first, bool) == isinstance(second, bool) and bool(first == second)
