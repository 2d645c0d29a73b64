"""Names of a package that are imported when somebody asks for them (PEP 562).

Who wants a checksum of ours waits for nothing that opens a store: it takes as long to import as DuckDB does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def importing(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package. `homes`: module of it -> the names that it has, with spaces.

    No module may have one of the names: once it was imported, by whomever, it would stand for it.
    """
    modules = {name: module for module, names in homes.items() for name in names.split()}

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, found)
        return found

    return find
