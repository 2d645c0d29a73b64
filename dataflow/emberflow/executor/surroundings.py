"""What of the driver's process a call may rely on wherever it runs: the import path and the working directory."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress

import msgspec


class Surroundings(msgspec.Struct, frozen=True):
    """Of one process at one moment. A notebook changes them between two calls, so they go with every call."""

    path: tuple[str, ...]
    directory: str | None
    """None: the directory was removed."""

    def enter(self) -> None:
        """Makes them this process's. What only this process has on its path stays, behind."""
        path = [*self.path, *(entry for entry in sys.path if entry not in self.path)]
        if path != sys.path:
            sys.path[:] = path
            importlib.invalidate_caches()
        # Another machine need not have the directory.
        with suppress(OSError):
            os.chdir(self.directory or ".")


def surroundings() -> Surroundings:
    """Those of this process."""
    try:
        directory = os.getcwd()
    except FileNotFoundError:
        directory = None
    return Surroundings(tuple(entry for entry in sys.path if isinstance(entry, str)), directory)
