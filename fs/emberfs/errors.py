"""Every error the store raises on purpose.

A class exists only where a caller can react to it, and each also derives from the builtin a Python
programmer would catch. Our own mistakes are `assert`, never one of these.

    EmberError
    ├── NotFound (FileNotFoundError)          no such path, or the file was removed under an open handle
    ├── AlreadyExists (FileExistsError)
    ├── NotADirectory (NotADirectoryError)
    ├── IsADirectory (IsADirectoryError)
    ├── DirectoryNotEmpty (OSError ENOTEMPTY)
    ├── InvalidPath (ValueError)              a bad URL, name, component length, or a rename into itself
    ├── LimitExceeded (ValueError)            a key, value, batch or link count over its stated limit
    ├── NoSpace (OSError ENOSPC)              refused before the disk is full; deletes still work
    ├── Corruption (OSError EIO)              bytes do not match their checksum; never returned as data
    ├── TargetFailed (OSError EIO)            the disk failed an fsync or a write; reopen the store
    ├── StoreBusy (BlockingIOError)           another process owns the store and cannot share it
    ├── StoreFormat (ValueError)              not a store, or written by a newer emberline
    ├── StoreClosed (ValueError)              the client or store was closed
    ├── Conflict (OSError EAGAIN)             a transaction lost a race; run it again
    ├── StaleChunk (OSError ESTALE)           a chunk version or truncate generation has moved on
    ├── UpdateUnknown (OSError EIO)           a write may or may not have happened; read to find out
    ├── Unavailable (ConnectionError)         nobody could serve it now; nothing happened, try again
    │   ├── Overloaded                        a server has too much to do; it says when to come again
    │   └── Unreachable                       there was no answer from the server that was asked: try another one
    │       └── Unanswered                    it had its time, and may be alive
    ├── DeadlineExceeded (TimeoutError)       no answer in time, to a request that changes nothing
    ├── StaleRouting (OSError ESTALE)         a server is in another chain version or may not serve; nothing happened
    ├── SessionExpired (OSError ESTALE)       the cluster gave this client up; connect again
    ├── DataLost (OSError EIO)                no replica has the last version of a chain; an operator must decide
    ├── AccessDenied (PermissionError)        a certificate, token or right is missing
    └── ProtocolError (ValueError)            the other side does not speak our protocol, or a newer one
"""

from __future__ import annotations

import errno


class EmberError(Exception):
    """Base of every error raised on purpose by emberfs."""


class _OSEmberError(EmberError, OSError):
    """An `EmberError` with an errno, so that code written for `OSError` reacts rightly."""

    errno_default = errno.EIO

    def __init__(self, message: str, path: str | None = None) -> None:
        if path is None:
            OSError.__init__(self, self.errno_default, message)
        else:
            OSError.__init__(self, self.errno_default, message, path)
        self.message = message
        self.path = path

    def __str__(self) -> str:
        return self.message if self.path is None else f"{self.message}: {self.path!r}"

    def __reduce__(self) -> tuple[type[_OSEmberError], tuple[str, str | None]]:
        return (type(self), (self.message, self.path))


class NotFound(_OSEmberError, FileNotFoundError):
    """No such path, inode, session or trash entry."""

    errno_default = errno.ENOENT


class AlreadyExists(_OSEmberError, FileExistsError):
    """The path exists and the call asked for a new one."""

    errno_default = errno.EEXIST


class NotADirectory(_OSEmberError, NotADirectoryError):
    """A component of the path is not a directory."""

    errno_default = errno.ENOTDIR


class IsADirectory(_OSEmberError, IsADirectoryError):
    """A file was needed and the path is a directory."""

    errno_default = errno.EISDIR


class DirectoryNotEmpty(_OSEmberError):
    """The directory still has entries; pass `recursive=True` to remove them too."""

    errno_default = errno.ENOTEMPTY


class InvalidPath(EmberError, ValueError):
    """A path, name or URL that can never be right."""


class LimitExceeded(EmberError, ValueError):
    """A request larger than a stated limit."""


class NoSpace(_OSEmberError):
    """The store refuses new data before the disk is full. Removing files and emptying the trash still work."""

    errno_default = errno.ENOSPC


class Corruption(_OSEmberError):
    """Stored bytes do not match their checksum. Names the file (when known), the chunk and the offset in the chunk."""

    errno_default = errno.EIO

    def __init__(self, message: str, path: str | None = None, *, chunk: str | None = None, offset: int | None = None):
        super().__init__(message, path)
        self.chunk = chunk
        self.offset = offset

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (_corruption, (self.message, self.path, self.chunk, self.offset))


def _corruption(message: str, path: str | None, chunk: str | None, offset: int | None) -> Corruption:
    return Corruption(message, path, chunk=chunk, offset=offset)


class TargetFailed(_OSEmberError):
    """The disk failed a write or an fsync. The target takes no more writes until the store is opened again."""

    errno_default = errno.EIO


class StoreBusy(_OSEmberError, BlockingIOError):
    """Another process owns the store and cannot share it. `pid` names it when the lock file says so."""

    errno_default = errno.EAGAIN

    def __init__(self, message: str, path: str | None = None, *, pid: int | None = None) -> None:
        super().__init__(message, path)
        self.pid = pid


class StoreFormat(EmberError, ValueError):
    """Not an emberline store, a damaged superblock, or a format newer than this program."""


class StoreClosed(EmberError, ValueError):
    """The client, file or store was closed before the call."""


class Conflict(_OSEmberError):
    """A transaction read something that changed before it committed. Nothing was applied; run it again."""

    errno_default = errno.EAGAIN


class StaleChunk(_OSEmberError):
    """The caller acted on a chunk version or a truncate generation that has moved on. Nothing was applied."""

    errno_default = errno.ESTALE


class UpdateUnknown(_OSEmberError):
    """A write was sent and its outcome is not known: it may or may not have happened."""

    errno_default = errno.EIO


class Unavailable(_OSEmberError, ConnectionError):
    """No server could take the request. Nothing was applied; try again."""

    errno_default = errno.EHOSTUNREACH


class Overloaded(Unavailable):
    """The server has more to do than it takes on, and did not begin with this. Come again after `retry_after_s`."""

    def __init__(self, message: str, path: str | None = None, *, retry_after_s: float = 0.1) -> None:
        super().__init__(message, path)
        self.retry_after_s = retry_after_s

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (_overloaded, (self.message, self.path, self.retry_after_s))


def _overloaded(message: str, path: str | None, retry_after_s: float) -> Overloaded:
    return Overloaded(message, path, retry_after_s=retry_after_s)


class Unreachable(Unavailable):
    """No connection could be made to a server, or the one there was is lost, or it did not answer in time.

    A server that met this when it asked another one was reached itself: it travels as Unavailable.
    """

    def __reduce__(self) -> tuple[type[Unavailable], tuple[str, str | None]]:
        return (Unavailable, (self.message, self.path))


class Unanswered(Unreachable):
    """The server that was asked did not answer in the time it was given. Nothing happened that matters."""


class DeadlineExceeded(_OSEmberError, TimeoutError):
    """No answer came in time. The request changes nothing, so it may be sent again."""

    errno_default = errno.ETIMEDOUT


class StaleRouting(_OSEmberError):
    """The server is in another chain version, or outside its lease, or not the one to ask. Nothing was applied."""

    errno_default = errno.ESTALE


class SessionExpired(_OSEmberError):
    """The cluster has given this client up: nothing of it is taken any more. Connect again."""

    errno_default = errno.ESTALE


class DataLost(_OSEmberError):
    """No replica is left with the last committed version of a chain: `emberline cluster accept-loss` decides."""

    errno_default = errno.EIO


class AccessDenied(_OSEmberError, PermissionError):
    """The peer has no certificate or token of this cluster, or not the right one."""

    errno_default = errno.EACCES


class GrantExpired(AccessDenied):
    """What a reader or writer showed was good, and is not any more: with a new grant it may go on."""


class ProtocolError(EmberError, ValueError):
    """A frame that is none of ours, too large, or of a newer protocol. That connection is closed."""
