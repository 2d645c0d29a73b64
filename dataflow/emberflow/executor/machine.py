"""What the executors of all processes of one user on this machine may use together, call by call.

Every local executor is made for the whole machine, so two of them, of two programs or of one, would use it twice. Each
call therefore takes its CPUs and its memory from the machine before it runs. First come, first served: a call waits
for those that came before it, whoever's they are, so two jobs at once take turns and a big call is never starved.

A call is a file in a directory that only its user can enter, named so that files sort in the order they came, and
locked by whoever runs the call. What is locked counts; what is not is left by a process that is gone, kill -9
included, and is removed by whoever sees it first. All looks and changes are made under a lock of the directory, which
is under $XDG_RUNTIME_DIR, or where there is none, under the system's directory for temporary files.

Invariants: the calls that run never sum to more than the machine has, or than the executor has that admits the last of
them, where its user asked for more than there is; a call that runs has no one before it that still waits.

Does not know: calls of other users, what runs in the program's own process, Ray, and the memory that idle workers keep.
A process that is stopped keeps what its calls have.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .base import Capacity
from .capacity import machine_capacity

_LOOK_S = 0.02
"""How often a call that waits looks whether its turn has come: a look costs some tens of microseconds."""

INSIDE = "EMBERFLOW_INSIDE_CALL"
"""Set for workers, and so for all that their calls start: it has its share by the call, and would wait for itself."""

_numbers = itertools.count()
_log = logging.getLogger(__name__)


class _Claim(msgspec.Struct, array_like=True):
    """The content of a call's file."""

    cpus: int
    memory_bytes: int
    runs: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine, as the processes see it that share `directory`."""

    directory: Path
    capacity: Capacity

    @contextmanager
    def share(
        self, cpus: int, memory_bytes: int, *, largest: Capacity, is_cancelled: Callable[[], bool]
    ) -> Iterator[bool]:
        """The block has so much of the machine, which is given back at its end; or False: it was cancelled while it
        waited. `largest` is what the executor has in all."""
        claim = _Claim(cpus, memory_bytes, False)
        limit = Capacity(
            cpus=max(self.capacity.cpus, largest.cpus),
            memory_bytes=max(self.capacity.memory_bytes, largest.memory_bytes),
        )
        with ExitStack() as stack:
            try:
                path, descriptor = self._enter(claim)
                stack.callback(_leave, path, descriptor)
                is_admitted = self._admit(path, descriptor, claim, limit)
                while not is_admitted and not is_cancelled():
                    time.sleep(_LOOK_S)
                    is_admitted = self._admit(path, descriptor, claim, limit)
            except OSError as error:
                # A full disk, say: to use the machine twice is better than not to use it.
                _log.warning("a call runs without regard to those of other programs: %s", error)
                is_admitted = True
            yield is_admitted

    def _enter(self, claim: _Claim) -> tuple[Path, int]:
        """The call's file, after all others."""
        with self._alone():
            # The machine's own clock, in every process; under the lock no two are equal.
            path = self.directory / f"{time.monotonic_ns():020d}-{os.getpid()}-{next(_numbers)}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.pwrite(descriptor, msgspec.msgpack.encode(claim), 0)
            except OSError:
                _leave(path, descriptor)
                raise
        return path, descriptor

    def _admit(self, path: Path, descriptor: int, claim: _Claim, limit: Capacity) -> bool:
        """Whether the call may run, and if so, that it does."""
        with self._alone():
            cpus, memory_bytes = claim.cpus, claim.memory_bytes
            for name in sorted(os.listdir(self.directory)):
                if name == path.name:
                    continue
                other = self._claim(self.directory / name)
                if other is None:
                    continue
                if not other.runs:
                    if name < path.name:
                        return False
                    continue
                cpus += other.cpus
                memory_bytes += other.memory_bytes
            if cpus > limit.cpus or memory_bytes > limit.memory_bytes:
                return False
            claim.runs = True
            os.pwrite(descriptor, msgspec.msgpack.encode(claim), 0)
            return True

    def _claim(self, path: Path) -> _Claim | None:
        """Somebody's; None if nobody's any more."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return msgspec.msgpack.decode(os.pread(descriptor, 1 << 10, 0), type=_Claim)
        else:
            path.unlink(missing_ok=True)
            return None
        finally:
            os.close(descriptor)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        # What cleans temporary files up may have taken it.
        self.directory.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _leave(path: Path, descriptor: int) -> None:
    # Without its file a call no longer counts, even if a child of this process has the lock too.
    path.unlink(missing_ok=True)
    os.close(descriptor)


def this_machine() -> Machine | None:
    """This machine, for the user we are. None inside a call, and if there is no directory that is the user's alone."""
    if INSIDE in os.environ:
        return None
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    parent = runtime if os.path.isdir(runtime) else tempfile.gettempdir()
    # Programs with another form of `_Claim` would have another number.
    directory = Path(parent) / f"emberflow-calls1-{os.getuid()}"
    machine = Machine(directory, machine_capacity())
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(f"{directory} is not a directory of this user's alone")
        with machine._alone():
            return machine
    except OSError as error:
        _log.warning("jobs run without regard to those of other programs on this machine: %s", error)
        return None
