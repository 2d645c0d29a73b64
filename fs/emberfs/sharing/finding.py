"""How a process comes to a store in a directory: it owns it, or there is a server that does, started if need be.

Does not know: what is said to a server.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ..errors import StoreBusy, Unavailable
from .door import knock
from .ownership import Mode, Ownership, read_owner
from .starting import start_server

POLL_S = 0.02
DECLARE_S = 0.2
"""More than enough between taking the lock and saying who has it."""
WAIT_S = 60.0
"""How long an owner may be neither the one nor the other: it starts, or leaves."""


def find_owner(
    directory: Path, settings: str, *, may_own: bool, is_over: Callable[[], bool] = lambda: False
) -> Ownership | int:
    """The lock, if nobody uses the store and we may own it for ourselves; else the pid of a server that has it. Blocks.

    The server may have gone when this returns. Raises StoreBusy (an owner that cannot share, or neither one nor the
    other for too long), DeadlineExceeded (an owner that does not answer), Unavailable (`is_over` says that nobody waits
    any more), and what opening the store raises.
    """
    deadline_s = time.monotonic() + WAIT_S
    unreachable_s = None
    while True:
        ownership = Ownership.take(directory)
        if ownership is not None:
            previous = ownership.previous
            if may_own and (previous is None or previous.mode in (None, Mode.INLINE)):
                return ownership
            start_server(ownership, settings)
            continue
        owner = read_owner(directory)
        if owner is not None and owner.mode is Mode.SERVER and owner.is_reachable:
            return owner.pid
        if owner is not None and owner.mode in (None, Mode.INLINE):
            if not owner.is_reachable:
                # What is written there may be of the owner before this one, which is just about to say what it is.
                unreachable_s = unreachable_s or time.monotonic()
                if time.monotonic() - unreachable_s < DECLARE_S:
                    time.sleep(POLL_S)
                    continue
                why = "it is older than this one" if owner.mode is None else "it has no socket there"
                raise StoreBusy(
                    f"process {owner.pid} owns this store and cannot share it ({why}); close it there first",
                    str(directory),
                    pid=owner.pid,
                )
            try:
                knock(directory, owner.pid)
                continue
            except Unavailable:
                pass  # It goes, comes, or has just been replaced.
        if is_over():
            raise Unavailable("the store is being closed")
        if time.monotonic() >= deadline_s:
            pid = owner.pid if owner is not None else None
            who = f"process {pid}" if pid is not None else "another process"
            raise StoreBusy(f"{who} owns this store and does not let us in", str(directory), pid=pid)
        time.sleep(POLL_S)
