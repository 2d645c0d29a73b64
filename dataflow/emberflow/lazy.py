"""The names of a package, each loaded when it is first used.

So a part of the package that needs little (the records of jobs) costs little, and the whole is there for who asks. What
is where is said once, in the stub that type checkers read too.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path


class LazyNames:
    """A package's `__getattr__`. Its public names are those that its `__init__.pyi` imports from its modules."""

    def __init__(self, package: str, file: str) -> None:
        self._package = package
        stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
        self._modules = {
            alias.name: node.module
            for node in stub.body
            if isinstance(node, ast.ImportFrom) and node.level == 1
            for alias in node.names
        }

    def names(self) -> list[str]:
        """What the package offers, in order."""
        return sorted(self._modules)

    def __call__(self, name: str) -> object:
        if name not in self._modules:
            raise AttributeError(f"module {self._package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{self._package}.{self._modules[name]}"), name)
