"""What the tests of a shared store share: who owns it now, and the end of servers that a test has started."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from emberfs.embedded import StoreConfig
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.sharing.ownership import Mode, Owner, Ownership, read_owner
from emberfs.sharing.server import ServerConfig, SharingServer

PATIENCE_S = 60.0


def owner_of(store: Path) -> Owner:
    """What the owner says of itself."""
    owner = read_owner(store)
    assert owner is not None
    return owner


def server_of(store: Path) -> int:
    """The process that serves the store."""
    owner = owner_of(store)
    assert owner.mode is Mode.SERVER
    return owner.pid


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def is_free(store: Path) -> bool:
    """Whether nobody owns the store."""
    ownership = Ownership.take(store)
    if ownership is None:
        return False
    ownership.close()
    return True


@contextlib.contextmanager
def no_server_left(store: Path) -> Iterator[None]:
    """At the end, a server of the store that has nobody left need not wait for anybody."""
    try:
        yield
    finally:
        owner = read_owner(store)
        # Of a test that has failed, it may be this process itself.
        is_another = owner is not None and owner.mode is Mode.SERVER and owner.pid != os.getpid()
        if owner is not None and is_another and not is_free(store):
            with contextlib.suppress(ProcessLookupError):
                os.kill(owner.pid, signal.SIGCONT)
                os.kill(owner.pid, signal.SIGTERM)
            until(lambda: is_free(store))


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that is stopped meanwhile, with all its threads: the signal goes to one, which may wait for a disk."""
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: all(state_of(task) in "TZ" for task in Path(f"/proc/{pid}/task").iterdir()))
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def state_of(task: Path) -> str:
    """A letter of the kernel's: T is stopped, Z has ended."""
    try:
        return (task / "stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


class ServedHere:
    """A store that this process serves to others."""

    def __init__(self, store: Path, config: ServerConfig) -> None:
        ownership = Ownership.take(store)
        assert ownership is not None
        self.ownership = ownership
        self.is_idle = threading.Event()
        self.runtime = AsyncioRuntime()
        self.portal = Portal(self.runtime)
        self.server = SharingServer(ownership, self.runtime, StoreConfig(), on_idle=self.is_idle.set, config=config)
        self.portal.run(self.server.start(None))

    def close(self) -> None:
        self.portal.run(self.server.close())
        self.runtime.stop()
        self.ownership.close()
