"""Every error emberkv raises on purpose, beside those of the store.

What the network, the disk and the rights of a caller do is told with the store's own errors (Unavailable,
DeadlineExceeded, AccessDenied, LimitExceeded, ...): whoever handles those handles these.

    EmberError
    └── KvError
        ├── InvalidNamespace (ValueError)    fields that make no namespace
        ├── NamespaceMismatch (ValueError)   the service has another namespace under this name
        ├── StaleOwner (OSError ESTALE)      another server has taken the namespace over; nothing happened
        ├── ReadOnly (OSError EROFS)         pages are served, and none are taken until the store takes writes again
        ├── SeatGone (OSError ESTALE)        the service has forgotten this client; open the namespace again
        ├── BreakerOpen (Unavailable)        the service failed several times in a row and is left alone for a while
        ├── SeededKeys (ValueError)          an engine's keys differ from process to process; says what to set
        ├── UnknownModel (ValueError)        no size is known for a model, or its config says none
        └── TraceFormat (ValueError)         a line of a trace is not what it should be
"""

from __future__ import annotations

import errno

from emberfs.errors import EmberError, Unavailable


class KvError(EmberError):
    """Base of every error raised on purpose by emberkv alone."""


class _OSKvError(KvError, OSError):
    """A `KvError` with an errno, so that code written for `OSError` reacts rightly."""

    errno_default = errno.EIO

    def __init__(self, message: str) -> None:
        OSError.__init__(self, self.errno_default, message)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type[_OSKvError], tuple[str]]:
        return (type(self), (self.message,))


class InvalidNamespace(KvError, ValueError):
    """Fields that make no namespace."""


class NamespaceMismatch(KvError, ValueError):
    """The service has another namespace under this name."""


class StaleOwner(_OSKvError):
    """Another server has taken the namespace over. Nothing happened."""

    errno_default = errno.ESTALE


class ReadOnly(_OSKvError):
    """The store does not take the index of the namespace, most likely being full: pages are served, none are taken."""

    errno_default = errno.EROFS


class SeatGone(_OSKvError):
    """The service has forgotten this client: it was restarted, or heard nothing for long."""

    errno_default = errno.ESTALE


class BreakerOpen(KvError, Unavailable):
    """The service did not answer several times in a row, and is not asked for a while. Nothing happened."""


class SeededKeys(KvError, ValueError):
    """An engine hashes prompts with a seed of its process: nobody else would ever find its pages."""


class UnknownModel(KvError, ValueError):
    """No size is known for a model of that name, or its config does not say how large its KV is."""


class TraceFormat(KvError, ValueError):
    """A line of a trace is not what it should be. `line` is its number, from 1."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message if line is None else f"line {line}: {message}")
        self.message = message
        self.line = line

    def __reduce__(self) -> tuple[type[TraceFormat], tuple[str, int | None]]:
        return (type(self), (self.message, self.line))
