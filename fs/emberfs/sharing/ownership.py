"""Who owns a store's directory: the process that holds the lock on `owner.lock`.

The lock is the kernel's (flock) and belongs to the open file: it ends when the last process that has the file open is
gone or has closed it, and no sooner. A process that is stopped owns the store still, so nobody else ever writes beside
it, however late it wakes up. An owner that moves out hands the open file itself on to the server it starts: the lock
is never free in between.

The file's content says how to reach the owner. It stays when the owner dies: a store whose last owner was a server that
did not leave by itself has clients that will come back, so the next owner is a server too.

Does not know: what is in the directory.
"""

from __future__ import annotations

import enum
import fcntl
import json
import os
import stat
from pathlib import Path

import msgspec

from .forking import no_fork

LOCK_FILE = "owner.lock"


class Mode(enum.StrEnum):
    """What the owner is."""

    INLINE = "inline"
    """A process of the user, for itself."""
    STARTING = "starting"
    """Somebody starts a server."""
    SERVER = "server"


class Owner(msgspec.Struct, frozen=True):
    """The content of the lock file."""

    pid: int
    mode: Mode | None = None
    """None: an emberline that could not share."""
    is_reachable: bool = False
    """It listens on the socket in the directory."""


class Ownership:
    """The lock, held by this process."""

    def __init__(self, directory: Path, file: int, previous: Owner | None) -> None:
        self.directory = directory
        self.file = file
        self.previous = previous
        """Who had it last, if that one did not give it up."""
        _files.add(file)

    @classmethod
    def take(cls, directory: Path) -> Ownership | None:
        """The lock, or None if somebody has it."""
        while True:
            with no_fork:
                file = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(file)
                    return None
                # The name may lead to another file by now: that one's lock is what others look at.
                try:
                    named = os.stat(directory / LOCK_FILE)
                except FileNotFoundError:
                    named = None
                if named is not None and os.path.samestat(named, os.fstat(file)):
                    return cls(directory, file, _decode(os.pread(file, 4096, 0)))
                os.close(file)

    @classmethod
    def inherited(cls, directory: Path, file: int) -> Ownership:
        """The lock that whoever started us had, as an open file."""
        assert stat.S_ISREG(os.fstat(file).st_mode)
        os.set_inheritable(file, False)
        return cls(directory, file, None)

    def declare(self, mode: Mode, *, is_reachable: bool = False) -> None:
        """Say what we are."""
        content = json.dumps({"pid": os.getpid(), "mode": mode, "is_reachable": is_reachable}).encode()
        # Padded and in one write, so that a reader sees one or the other.
        os.pwrite(self.file, content.ljust(128), 0)

    def clear(self) -> None:
        """Nothing is left to be known to the next owner."""
        os.ftruncate(self.file, 0)

    def close(self) -> None:
        """Give the lock up, unless a process that we started has it too."""
        with no_fork:
            if self.file in _files:
                _files.discard(self.file)
                os.close(self.file)


def read_owner(directory: Path) -> Owner | None:
    """What the owner, or the last one, says of itself. None: nothing that could be read."""
    try:
        return _decode((directory / LOCK_FILE).read_bytes())
    except FileNotFoundError:
        return None


def _decode(content: bytes) -> Owner | None:
    try:
        return msgspec.json.decode(content, type=Owner)
    except msgspec.DecodeError:
        return None


_files: set[int] = set()
"""Of all stores of this process, those too that are just being opened."""


def _forget_locks_after_fork() -> None:
    """In the child: the locks are the parent's."""
    for file in _files:
        # The lock is the open file's, which we share: closing our copy leaves the parent's lock alone.
        os.close(file)
    _files.clear()


os.register_at_fork(after_in_child=_forget_locks_after_fork)
