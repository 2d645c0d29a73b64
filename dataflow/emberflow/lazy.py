"""The names of a package, each loaded when it is first used.

So a part of the package that needs little (the records of jobs) costs little, and the whole is there for who asks.
"""

from __future__ import annotations

import importlib


class LazyNames:
    """A package's `__getattr__`: in which of its modules each public name is."""

    def __init__(self, package: str, **modules: tuple[str, ...]) -> None:
        self._package = package
        self._modules = {name: module for module, names in modules.items() for name in names}

    def names(self) -> list[str]:
        """What the package offers, in order."""
        return sorted(self._modules)

    def __call__(self, name: str) -> object:
        if name not in self._modules:
            raise AttributeError(f"module {self._package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{self._package}.{self._modules[name]}"), name)
