"""Blocking work in a few plain threads. An executor would take no work any more once the interpreter ends, and a save
that is under way then has to be finished.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


def in_threads(work: Sequence[Callable[[], None]]) -> None:
    """Do all of it at the same time, and raise the first error once all have ended."""
    if len(work) == 1:
        work[0]()
        return
    errors: list[BaseException] = []

    def run(each: Callable[[], None]) -> None:
        try:
            each()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(each,), name="emberline-checkpoint") for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
