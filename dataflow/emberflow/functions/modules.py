"""Where a module comes from: the user's own tree, an installed package, Python itself.

The answer decides how a function travels (`shipping.py`) and how far one looks into it (`identity.py`).

Does not know: functions.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import sysconfig
from functools import cache
from types import ModuleType

_OURS = frozenset({"emberfs", "emberflow", "emberkv", "emberline", "embertrain"})
"""Every worker has these, run from a checkout or not."""
_INSTALLED_PARTS = ("site-packages", "dist-packages")


class LocalModules:
    """Those among all that are loaded that are local. There may be thousands, and whoever sends a task asks: each is
    looked at once, as long as the user's own code is in the same places. Not for two threads at a time."""

    def __init__(self) -> None:
        self._homes: tuple[str, ...] = ()
        self._looked_at: dict[str, tuple[ModuleType, bool]] = {}

    def __call__(self) -> list[ModuleType]:
        homes = _homes()
        before = self._looked_at if homes == self._homes else {}
        self._homes, self._looked_at = homes, {}
        for name, module in sys.modules.copy().items():  # in one step: other threads may import
            known = before.get(name)
            if known is None or known[0] is not module:
                known = module, isinstance(module, ModuleType) and is_local(module)
            self._looked_at[name] = known
        return [module for module, local in self._looked_at.values() if local]


def is_local(module: ModuleType) -> bool:
    """Whether it is Python source of the user's own: below the working directory or beside the program, and not in
    an installed package. Workers elsewhere have no copy of such a module."""
    path = _source(module)
    if path is None or not path.endswith(".py") or is_installed(module):
        return False
    return any(path.startswith(home) for home in _homes())


def is_installed(module: ModuleType) -> bool:
    """Whether its name and version say everything about it: a package, a module of Python's, or one of ours."""
    name = module.__name__.partition(".")[0]
    if name in _OURS or name in sys.stdlib_module_names or name in sys.builtin_module_names:
        return True
    path = _source(module)
    if path is None:
        return False
    if path.startswith(_stdlib()) or any(f"{os.sep}{part}{os.sep}" in path for part in _INSTALLED_PARTS):
        return True
    return (target := _target(name)) is not None and path.startswith(target)


@cache
def version(name: str) -> str | None:
    """The version of an installed module, by its full name; None if it has none."""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return "python"
    try:
        return importlib.metadata.version("emberline" if top in _OURS else top)
    except importlib.metadata.PackageNotFoundError:
        pass
    # Not by getattr: some packages warn when they are asked.
    if isinstance(said := vars(sys.modules[top]).get("__version__") if top in sys.modules else None, str):
        return said
    distributions = _distributions().get(top, [])
    return importlib.metadata.version(distributions[0]) if distributions else "source" if top in _OURS else None


@cache
def _target(name: str) -> str | None:
    """The directory, of any name, that a package was installed into; None for a source tree. (One that is installed
    in place is elsewhere than where its metadata are.)"""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return os.path.join(_real(str(distribution.locate_file(""))), "") if distribution.read_text("INSTALLER") else None


@cache
def _distributions() -> dict[str, list[str]]:
    """Module to distributions. Reads the metadata of everything installed."""
    return dict(importlib.metadata.packages_distributions())


def _source(module: ModuleType) -> str | None:
    """The file it was loaded from, links resolved; None for a namespace package or a module made by hand."""
    path = getattr(module, "__file__", None)
    return _real(path) if isinstance(path, str) else None


def _homes() -> tuple[str, ...]:
    """Directories, with a separator at the end, of the user's own code."""
    homes = [os.getcwd()]
    main = _source(sys.modules["__main__"])
    if main is not None:
        homes.append(os.path.dirname(main))
    return tuple(os.path.join(_real(home), "") for home in homes)


@cache
def _real(path: str) -> str:
    return os.path.realpath(path)


@cache
def _stdlib() -> tuple[str, ...]:
    return tuple(os.path.join(_real(sysconfig.get_path(kind)), "") for kind in ("stdlib", "platstdlib"))
