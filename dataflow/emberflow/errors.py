"""Every error the dataflow layer raises on purpose.

An error of the storage below (a checksum mismatch, a full disk, missing credentials) is not among them: it
comes through as it was raised, with a note that says which query met it.

    FlowError
    ├── QueryError (ValueError)                DuckDB refuses the SQL or fails on the data; its message, verbatim
    ├── DatasetNotFound (FileNotFoundError)    no file matches a path or pattern
    ├── DatasetExists (FileExistsError)        the target of a write has files and the mode is "error"
    ├── InvalidArgument (ValueError)           a setting, mode, parameter or URL that can never be right
    ├── OutOfMemory (MemoryError)              the query does not fit `memory_limit`, spilling included
    ├── SessionClosed (ValueError)
    ├── UnsupportedType (TypeError)            a DuckDB type that does not go through what was asked of it
    ├── UserCodeError (RuntimeError)           a Python function of the user's raised, or gave what does not fit
    ├── ExchangeCorrupt (IOError)              an intermediate is damaged or gone; the job makes it again
    ├── TokensInvalid (ValueError)             token shards that are damaged, not whole, or of another version
    ├── CallCancelled (InterruptedError)       a call was cancelled, by its user, a limit or a deadline
    ├── WorkerDied (ConnectionError)           the worker of a call is gone; what the call did is unknown
    └── CallOutOfMemory (MemoryError)          the call, or the worker for it, needed more memory than it was given
"""

from __future__ import annotations

import pickle


class FlowError(Exception):
    """Base of every error raised on purpose by emberflow."""


class QueryError(FlowError, ValueError):
    """DuckDB refused the SQL or failed while running it. The message is DuckDB's; `query` is the SQL as given."""

    def __init__(self, message: str, query: str = "") -> None:
        super().__init__(message)
        self.query = query


class DatasetNotFound(FlowError, FileNotFoundError):
    """No file matches a path or pattern named in a query."""


class DatasetExists(FlowError, FileExistsError):
    """The target of a write has files already; pass mode="overwrite" or mode="append"."""


class InvalidArgument(FlowError, ValueError):
    """A setting, mode, parameter or URL that can never be right."""


class OutOfMemory(FlowError, MemoryError):
    """The query needs more than the session's `memory_limit`, and what it holds cannot spill to disk."""


class SessionClosed(FlowError, ValueError):
    """The session was closed before the call."""


class UnsupportedType(FlowError, TypeError):
    """Values of a DuckDB type cannot go through an exchange file, or have no hash. The query may still run as one
    task."""


class UserCodeError(FlowError, RuntimeError):
    """A Python function of the user's raised, or gave what does not fit. What it raised is the `__cause__`, which
    comes along from a worker if it can be pickled; the message says it in any case.

    `function` is its name; `row`, cut short, what it was called with, or empty for a whole batch.
    """

    def __init__(self, message: str, *, function: str, row: str = "") -> None:
        super().__init__(message)
        self.function = function
        self.row = row

    def __reduce__(self) -> tuple[object, ...]:
        return _user_code_error, (str(self), self.function, self.row, _pickled(self.__cause__))


def _pickled(error: BaseException | None) -> bytes | None:
    try:
        data = pickle.dumps(error)
        # Many exceptions can be pickled but not made again.
        pickle.loads(data)
    except Exception:
        return None
    return data


def _user_code_error(message: str, function: str, row: str, cause: bytes | None) -> UserCodeError:
    error = UserCodeError(message, function=function, row=row)
    try:
        error.__cause__ = pickle.loads(cause) if cause is not None else None
    except Exception:
        # Its class is known where the function ran and not here.
        error.__cause__ = None
    return error


class ExchangeCorrupt(FlowError, OSError):
    """An intermediate file is damaged, cut short or gone. `path` names it; whoever made it has to make it again."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[type[ExchangeCorrupt], tuple[str, str]]:
        return type(self), (str(self), self.path)


class CallCancelled(FlowError, InterruptedError):
    """A call was cancelled before it ended. Part of what it does may have happened."""


class WorkerDied(FlowError, ConnectionError):
    """The process that ran a call is gone. The call may or may not have happened."""


class CallOutOfMemory(FlowError, MemoryError):
    """A call needed more memory than it was given; with more it may succeed."""


class TokensInvalid(FlowError, ValueError):
    """What should be token shards is not whole, damaged, or of a version or form that this program does not read."""
