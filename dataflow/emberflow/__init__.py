"""SQL over datasets on any fsspec URL, `ember://` included. Start with `emberflow.init()`."""

from __future__ import annotations

from .dataframe import DataFrame
from .errors import (
    CallCancelled,
    CallOutOfMemory,
    DatasetExists,
    DatasetNotFound,
    ExchangeCorrupt,
    FlowError,
    InvalidArgument,
    OutOfMemory,
    QueryError,
    SessionClosed,
    TokensInvalid,
    UnsupportedType,
    UserCodeError,
    WorkerDied,
)
from .functions.sqltypes import UDFAnyParameters, UDFListType, UDFMapType, UDFStructType, UDFType
from .functions.udf import Udf, udf
from .session import Session, SessionConfig, init
from .tokens import TokenDataset, tokenize, write_tokens
from .writer import WriteReport

__all__ = [
    "CallCancelled",
    "CallOutOfMemory",
    "DataFrame",
    "DatasetExists",
    "DatasetNotFound",
    "ExchangeCorrupt",
    "FlowError",
    "InvalidArgument",
    "OutOfMemory",
    "QueryError",
    "Session",
    "SessionClosed",
    "SessionConfig",
    "TokenDataset",
    "TokensInvalid",
    "UDFAnyParameters",
    "UDFListType",
    "UDFMapType",
    "UDFStructType",
    "UDFType",
    "Udf",
    "UnsupportedType",
    "UserCodeError",
    "WorkerDied",
    "WriteReport",
    "init",
    "tokenize",
    "udf",
    "write_tokens",
]
