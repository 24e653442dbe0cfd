"""Packages that import their public names on first use, which keeps `import lpt_peft` fast."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


class _LazyPackage(ModuleType):
    """A package that imports the module of a public name when the name is first read."""

    _lpt_homes: dict[str, str]

    def __getattr__(self, name: str) -> Any:
        homes = self._lpt_homes
        if name in homes:
            value = getattr(import_module(f"{self.__name__}.{homes[name]}"), name)
            setattr(self, name, value)
            return value
        if name in homes.values():
            return import_module(f"{self.__name__}.{name}")
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        # The import system sets submodules as attributes: `recipe/train.py` must not hide the function `train`.
        if not (isinstance(value, ModuleType) and name in self._lpt_homes):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._lpt_homes})


def import_on_first_use(package: str, names: Mapping[str, Sequence[str]]) -> None:
    """Import the public names of a package when they are first read.

    The package repeats the imports under `TYPE_CHECKING` for type checkers and editors.

    Args:
        package: `__name__` of the package, which calls this from its `__init__.py`.
        names: Public names by submodule.

    Example:
        >>> import lpt_peft
        >>> "AGCLLoss" in dir(lpt_peft), lpt_peft.AGCLLoss.__module__
        (True, 'lpt_peft.losses.agcl')
    """
    module = sys.modules[package]
    module.__dict__["_lpt_homes"] = {name: home for home, public in names.items() for name in public}
    module.__class__ = _LazyPackage
