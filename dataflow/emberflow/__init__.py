"""SQL over datasets on any fsspec URL, `ember://` included. Start with `emberflow.init()`.

Each name is loaded when it is first used: looking at jobs needs neither DuckDB nor Arrow. The names are in
`__init__.pyi`.
"""

from __future__ import annotations

from .lazy import LazyNames

__getattr__ = LazyNames(__name__, __file__)
__dir__ = __getattr__.names
__all__ = __getattr__.names()
