"""What pages are interchangeable: the model, and everything else that changes the bytes of a page.

Invariants: two namespaces have the same digest if and only if all their fields are equal; the digest depends on no
process, machine or version of ours (docs/formats.md, "KV-cache keys"). There is no rank in it: ranks of any
tensor-parallel degree that hold the same bytes share them, and who holds other bytes says so in `layout`.

Does not know: tenants and salts, which are part of a key and not of the namespace.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable
from functools import lru_cache

import msgspec

from .errors import InvalidNamespace

SCHEME = b"ekns1"
"""The first field hashed. Another set or order of fields gets another one."""

TEXT_CHARS_MAX = 256
PAGE_TOKENS_MAX = 65_536
KINDS_MAX = 16
"""More than twice what the engine with most of them has: DeepSeek V4's seven pools in SGLang."""

PAYLOAD_BYTES_MAX = 64 << 20
NAME_MODEL_CHARS = 40

_KIND_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_TRAILING = re.compile(r"trailing:([1-9][0-9]{0,5})")
_LENGTH = struct.Struct("<I")


def fields_bytes(fields: Iterable[bytes]) -> bytes:
    """Fields with their lengths before them: no two lists of fields give the same bytes."""
    return b"".join(map(field_bytes, fields))


def field_bytes(field: bytes) -> bytes:
    """A field, its length before it."""
    return _LENGTH.pack(len(field)) + field


class Kind(msgspec.Struct, frozen=True):
    """One payload that every page has, such as the compressed KV, the indexer's keys or the window's states."""

    name: str
    payload_bytes: int = 0
    """Of each page; 0: it varies."""
    policy: str = "all"
    """"all": a hit needs it on every page. "trailing:N": only on the last N pages of the hit."""

    def __post_init__(self) -> None:
        if not _KIND_NAME.fullmatch(self.name):
            raise InvalidNamespace(
                f"the name of a kind is up to 64 of a-z, 0-9, '_', '.' and '-', and not {self.name!r}"
            )
        if not 0 <= self.payload_bytes <= PAYLOAD_BYTES_MAX:
            raise InvalidNamespace(f"kind {self.name!r}: payload_bytes is 0 to {PAYLOAD_BYTES_MAX:,}")
        if self.policy != "all" and not _TRAILING.fullmatch(self.policy):
            raise InvalidNamespace(
                f'kind {self.name!r}: the policy is "all" or "trailing:N", N from 1, not {self.policy!r}'
            )

    @property
    def trailing(self) -> int | None:
        """Of how many of the last pages of a hit it is needed; None: of all."""
        found = _TRAILING.fullmatch(self.policy)
        return int(found[1]) if found else None


class Namespace(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of one model as one engine lays its pages out. Raises InvalidNamespace."""

    model: str
    revision: str = ""
    """Of the weights: pages of another one are another model's."""
    dtype: str
    layout: str
    """How the bytes of a page lie, in the engine's own words; with the rank where the bytes are a rank's."""
    page_tokens: int
    kinds: tuple[Kind, ...]
    """The first has policy "all". Their order counts."""

    def __post_init__(self) -> None:
        for name in ("model", "revision", "dtype", "layout"):
            text = getattr(self, name)
            if (not text and name != "revision") or len(text) > TEXT_CHARS_MAX or not (text.isprintable()):
                raise InvalidNamespace(f"{name} is 1 to {TEXT_CHARS_MAX} printable characters, not {text!r}")
        if not 1 <= self.page_tokens <= PAGE_TOKENS_MAX:
            raise InvalidNamespace(f"page_tokens is 1 to {PAGE_TOKENS_MAX:,}, not {self.page_tokens}")
        if not 1 <= len(self.kinds) <= KINDS_MAX:
            raise InvalidNamespace(f"a namespace has 1 to {KINDS_MAX} kinds, not {len(self.kinds)}")
        if len({kind.name for kind in self.kinds}) < len(self.kinds):
            raise InvalidNamespace("two kinds have the same name")
        if self.kinds[0].policy != "all":
            raise InvalidNamespace(f'the first kind ({self.kinds[0].name!r}) is needed of every page: policy "all"')

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for all of it."""
        return _digest(self)

    @property
    def name(self) -> str:
        """What its directory is called: safe in a path, readable, and another one for another namespace."""
        readable = re.sub(r"[^a-z0-9]+", "-", self.model.lower())[:NAME_MODEL_CHARS].strip("-")
        return f"{readable or 'model'}-{self.digest.hex()[:16]}"


@lru_cache(maxsize=256)
def _digest(namespace: Namespace) -> bytes:
    fields = [
        SCHEME,
        *(text.encode() for text in (namespace.model, namespace.revision, namespace.dtype, namespace.layout)),
        struct.pack("<I", namespace.page_tokens),
        struct.pack("<I", len(namespace.kinds)),
    ]
    for kind in namespace.kinds:
        fields += [kind.name.encode(), struct.pack("<Q", kind.payload_bytes), kind.policy.encode()]
    return hashlib.sha256(fields_bytes(fields)).digest()
