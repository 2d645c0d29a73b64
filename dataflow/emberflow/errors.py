"""Every error the dataflow layer raises on purpose.

An error of the storage below (a checksum mismatch, a full disk, missing credentials) is not among them: it
comes through as it was raised, with a note that says which query met it.

    FlowError
    ├── QueryError (ValueError)                DuckDB refuses the SQL or fails on the data; its message, verbatim
    ├── DatasetNotFound (FileNotFoundError)    no file matches a path or pattern
    ├── DatasetExists (FileExistsError)        the target of a write has files and the mode is "error"
    ├── InvalidArgument (ValueError)           a setting, mode, parameter or URL that can never be right
    ├── OutOfMemory (MemoryError)              the query does not fit `memory_limit`, spilling included
    └── SessionClosed (ValueError)
"""

from __future__ import annotations


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
