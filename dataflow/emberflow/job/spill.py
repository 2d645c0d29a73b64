"""How much a task has spilled: the most that its DuckDB's temporary files held at a moment.

Looked at from outside, as DuckDB 1.4 tells nobody: every tenth of a second, and whenever the task gives a batch of
rows. A spill that comes and goes between two looks is not seen.

Does not know: what is spilled, or why.
"""

from __future__ import annotations

import contextlib
import os
import threading
from types import TracebackType

_LOOK_S = 0.1


class SpillWatch:
    """Over the directories it is told of, for the length of a `with` block."""

    def __init__(self) -> None:
        self.most_bytes = 0
        self._directories: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="emberflow-spill", daemon=True)

    def __enter__(self) -> SpillWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def add(self, directory: str) -> None:
        """One more directory that nothing else spills to."""
        self._directories.add(directory)

    def look(self) -> None:
        """Takes what is there now into account."""
        self.most_bytes = max(self.most_bytes, sum(map(_held_bytes, tuple(self._directories))))

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self.look()


def _held_bytes(directory: str) -> int:
    held = 0
    # DuckDB makes it when it first spills, and files go while we look. No task fails over what it is only told.
    with contextlib.suppress(OSError), os.scandir(directory) as files:
        for file in files:
            with contextlib.suppress(OSError):
                held += file.stat().st_size
    return held
