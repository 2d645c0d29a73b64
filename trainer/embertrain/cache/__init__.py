"""What a model keeps of sequences: rows by layer and kind, in pages and rings."""

from .cache import Cache, Rows
from .spec import PAGE_TOKENS, CacheSpec, RowSpec

__all__ = ["PAGE_TOKENS", "Cache", "CacheSpec", "RowSpec", "Rows"]
