"""The user's Python inside jobs: how it travels, what it means, scalar functions for SQL, operators over batches."""

from __future__ import annotations

from .identity import Identity, identity_of
from .sqltypes import TypeSpec, UDFAnyParameters, UDFListType, UDFMapType, UDFStructType, UDFType
from .steps import PythonStep, apply
from .udf import Udf, udf

__all__ = [
    "Identity",
    "PythonStep",
    "TypeSpec",
    "UDFAnyParameters",
    "UDFListType",
    "UDFMapType",
    "UDFStructType",
    "UDFType",
    "Udf",
    "apply",
    "identity_of",
    "udf",
]
