# What `__init__.py` offers, for type checkers: there each name is loaded when it is first used.
from __future__ import annotations

from .dataframe import DataFrame
from .errors import (
    DatasetExists,
    DatasetNotFound,
    FlowError,
    InvalidArgument,
    OutOfMemory,
    QueryError,
    SessionClosed,
)
from .session import Session, SessionConfig, init
from .writer import WriteReport

__all__ = [
    "DataFrame",
    "DatasetExists",
    "DatasetNotFound",
    "FlowError",
    "InvalidArgument",
    "OutOfMemory",
    "QueryError",
    "Session",
    "SessionClosed",
    "SessionConfig",
    "WriteReport",
    "init",
]
