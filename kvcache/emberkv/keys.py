"""The key of a page: 32 bytes of SHA-256 that stand for its namespace, tenant, salt and every token up to its end.

Invariants: a key depends on nothing else, such as a process's hash seed, a rank or a version of ours; every field that
is hashed has its length before it, so two different lists of fields are two different inputs. The scheme id comes
first: a change of any of this gets another id, and so other keys. Test vectors: docs/formats.md, "KV-cache keys".

Does not know: what a page holds, or where it is.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from emberfs.errors import LimitExceeded

from .namespace import Namespace, fields_bytes

if TYPE_CHECKING:
    from hashlib import _Hash

TOKENS_SCHEME = b"ek1"
OPAQUE_SCHEME = b"ek1o"

KEY_BYTES = 32
ROOT = bytes(KEY_BYTES)
"""The parent of a first page."""

TOKEN_MAX = 2**32 - 1

_LENGTH = struct.Struct("<I")
_PARENT_LENGTH = _LENGTH.pack(KEY_BYTES)


def page_keys(
    namespace: Namespace, tokens: Any, *, tenant: str = "default", salt: bytes = b"", parent: bytes = ROOT
) -> list[bytes]:
    """The keys of the whole pages of `tokens`, each over its tokens and the key before it; what is left over has none.

    `tokens` is a sequence of integers, or an array or tensor of one dimension that NumPy can see. `parent` is the key
    of the page before them. Raises TypeError for what are no integers, LimitExceeded for what 32 bits do not hold.
    """
    _check_key(parent)
    data = token_bytes(tokens)
    size = namespace.page_tokens * 4
    start = _seed(TOKENS_SCHEME, namespace, tenant, salt, _PARENT_LENGTH)
    length = _LENGTH.pack(size)
    keys = []
    for offset in range(0, len(data) - size + 1, size):
        state = start.copy()
        state.update(parent + length + data[offset : offset + size])
        parent = state.digest()
        keys.append(parent)
    return keys


def opaque_keys(
    namespace: Namespace, engine_keys: Iterable[bytes], *, tenant: str = "default", salt: bytes = b""
) -> list[bytes]:
    """Keys for an engine's own, which must say all there is to say about a page beside its namespace."""
    start = _seed(OPAQUE_SCHEME, namespace, tenant, salt, b"")
    keys = []
    for engine_key in engine_keys:
        state = start.copy()
        state.update(_LENGTH.pack(len(engine_key)) + engine_key)
        keys.append(state.digest())
    return keys


@lru_cache(maxsize=1024)
def _seed(scheme: bytes, namespace: Namespace, tenant: str, salt: bytes, more: bytes) -> _Hash:
    """A hash that has seen the fields that are the same for every page, then `more`. Only ever copied."""
    return hashlib.sha256(fields_bytes((scheme, namespace.digest, tenant.encode(), salt)) + more)


def _check_key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise LimitExceeded(f"a key has {KEY_BYTES} bytes, not {len(key)}")


def token_bytes(tokens: Any) -> bytes:
    """Tokens as uint32, little-endian. Raises as `page_keys` does."""
    if isinstance(tokens, list | tuple | range):
        return _listed_bytes(tokens)
    values = np.asarray(tokens)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise TypeError(f"tokens are one dimension of integers, not {values.ndim} of {values.dtype}")
    # A uint32 array, which is what an engine has, needs no look at its values.
    if values.size and values.dtype != np.uint32 and (int(values.min()) < 0 or int(values.max()) > TOKEN_MAX):
        raise LimitExceeded(f"a token is 0 to {TOKEN_MAX}, not {int(values.min())} to {int(values.max())}")
    return values.astype("<u4", copy=False).tobytes()


def _listed_bytes(tokens: Sequence[int]) -> bytes:
    try:
        values = array("I", tokens)  # twice as fast as NumPy, and it checks the range of each
    except OverflowError as error:
        raise LimitExceeded(f"a token is 0 to {TOKEN_MAX}: {error}") from error
    assert values.itemsize == 4
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
