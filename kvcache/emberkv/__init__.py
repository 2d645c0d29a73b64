"""emberkv: KV pages of prompts on the store, for inference nodes.

    with emberkv.connect("127.0.0.1:7400", namespace) as cache:
        keys = cache.keys(tokens)
        hit = cache.match(keys)
        pages = cache.get(hit)

The map of the package is `kvcache/README.md`.
"""

from .breaker import BreakerConfig
from .client import KVCache
from .connect import connect
from .errors import (
    BreakerOpen,
    InvalidNamespace,
    KvError,
    NamespaceMismatch,
    ReadOnly,
    SeatGone,
    SeededKeys,
    StaleOwner,
)
from .hit import Hit
from .namespace import Kind, Namespace
from .operator import Operator
from .prefetch import Prefetch

__all__ = [
    "BreakerConfig",
    "BreakerOpen",
    "Hit",
    "InvalidNamespace",
    "KVCache",
    "Kind",
    "KvError",
    "Namespace",
    "NamespaceMismatch",
    "Operator",
    "Prefetch",
    "ReadOnly",
    "SeatGone",
    "SeededKeys",
    "StaleOwner",
    "connect",
]
