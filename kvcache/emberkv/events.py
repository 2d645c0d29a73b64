"""KV events: which pages came and went, as vLLM tells it of its own, for routers that look for prefixes.

Structures and their fields are those of `vllm.distributed.kv_events` (0.33): a batch is an array of a time and events,
an event a map with its class under "type". A page is a block, its key the block's hash; the medium is STORAGE, the
owner "emberkv". Of a namespace with several kinds each is a group of its own, by its number.

Invariants: what is told of a page comes in the order in which it happened. Where something could not be told, all of
the namespace is cleared and told again: a router may miss a page that is there, and then learns of it.

A page has no tokens with it. Who puts it may tell them; they are told on with the event of that put, if the feed is
asked to, and unchecked: a page's key has the salt in it, which is nobody's business here.

Does not know: sockets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from emberfs.errors import ProtocolError

from .journal import AnyEntry, Evicted, Put, Unplaced, split
from .keys import KEY_BYTES, ROOT
from .pool import Pool
from .table import ORPHAN

MEDIUM = "STORAGE"
OWNER = "emberkv"
PAGES_MAX = 200_000
"""That wait to be told. More, and the namespace is told anew."""
TOKENS_MAX = 1 << 20
"""That wait to be told. What comes beyond them is told without."""
RESYNC_SLOTS = 2048
"""Of those that are told anew in one batch: a few milliseconds."""


class Event(msgspec.Struct, omit_defaults=True, tag=True):
    """Base of events."""


class BlockStored(Event):
    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    """Of the first; each other hangs on the one before."""
    token_ids: list[int]
    """Of all of them, or none."""
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(Event):
    block_hashes: list[bytes]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(Event):
    pass


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    """Of one namespace. `ts`: wall clock, seconds."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


AnyEvent = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass(slots=True)
class _Topic:
    """A namespace."""

    pool: Pool
    page_tokens: int
    groups: list[int | None]
    """Of each kind."""
    events: list[AnyEvent] = field(default_factory=list)
    pages: int = 0
    """In `events`."""
    tokens: int = 0
    """In `events`."""
    telling: dict[bytes, bytes] = field(default_factory=dict)
    """Key -> tokens, uint32 little-endian, of pages that are being committed now."""
    resync_from: int | None = 0
    """Which slot is told next of those that are told anew; None: all were."""


class EventFeed:
    """Events of a service, until somebody takes them to tell. `tells_tokens`: those of pages that are put, too."""

    def __init__(self, *, tells_tokens: bool = False) -> None:
        self.tells_tokens = tells_tokens
        self._topics: dict[str, _Topic] = {}

    def follow(self, pool: Pool) -> None:
        """Tell of a namespace from here on: first that all is cleared, then what there is, then what happens."""
        kinds = len(pool.namespace.kinds)
        groups: list[int | None] = [None] if kinds == 1 else list(range(kinds))
        topic = _Topic(pool, pool.namespace.page_tokens, groups)
        topic.events.append(AllBlocksCleared())
        self._topics[pool.namespace.name] = topic
        pool.index.listener = lambda entry: self._note(topic, entry)

    @contextmanager
    def with_tokens(self, pool: Pool, keys: Sequence[bytes], tokens: bytes) -> Iterator[None]:
        """What is put meanwhile of `keys` is told with tokens, uint32 little-endian. Raises ProtocolError where they
        are not of as many pages."""
        topic = self._topics.get(pool.namespace.name)
        size = 4 * pool.namespace.page_tokens
        if len(tokens) != size * len(keys):
            raise ProtocolError(f"{len(keys)} pages have {len(keys) * size // 4} tokens, not {len(tokens) // 4}")
        if topic is None or not self.tells_tokens:
            yield
            return
        topic.telling = {key: tokens[at * size : (at + 1) * size] for at, key in enumerate(keys)}
        try:
            yield
        finally:
            topic.telling = {}

    def take(self, now_s: float) -> Iterator[tuple[str, EventBatch]]:
        """(namespace, what happened in it since), at most one batch of each."""
        for name, topic in list(self._topics.items()):
            if topic.pool.is_lost:
                # Whoever serves it now tells of it.
                del self._topics[name]
                continue
            if topic.resync_from is not None:
                topic.resync_from = self._tell_some(topic, topic.resync_from)
            events, topic.events, topic.pages, topic.tokens = topic.events, [], 0, 0
            if events:
                yield name, EventBatch(now_s, events)

    def _note(self, topic: _Topic, entry: AnyEntry) -> None:
        if isinstance(entry, Put):
            keys, parents = split(entry.keys, KEY_BYTES), split(entry.parents, KEY_BYTES)
            topic.events += [_stored(topic, run, above, entry.kind) for run, above in _chains(keys, parents)]
        elif isinstance(entry, Evicted | Unplaced):
            keys = split(entry.keys, KEY_BYTES)
            kinds = range(len(topic.groups)) if isinstance(entry, Evicted) else (entry.kind,)
            for kind in kinds:
                self._removed(topic, keys, topic.groups[kind])
        else:
            return
        topic.pages += len(keys)
        if topic.pages > PAGES_MAX:
            topic.events, topic.pages, topic.tokens, topic.resync_from = [AllBlocksCleared()], 0, 0, 0

    def _removed(self, topic: _Topic, keys: list[bytes], group: int | None) -> None:
        last = topic.events[-1] if topic.events else None
        if isinstance(last, BlockRemoved) and last.group_idx == group:
            last.block_hashes += keys
        else:
            topic.events.append(BlockRemoved(keys, MEDIUM, group, ownership=OWNER))

    def _tell_some(self, topic: _Topic, begin: int) -> int | None:
        """Of the pages that are there anyway, from slot `begin` on; where to go on. After what happened: a page that
        is told twice is there all the same, and one that went is not told again."""
        table = topic.pool.table
        end = min(begin + RESYNC_SLOTS, len(table.keys))
        for kind, places in enumerate(table.places):
            there = places["segment"][begin:end] != 0
            slots = [begin + int(slot) for slot in there.nonzero()[0] if table.parent[begin + slot] > ORPHAN]
            keys, parents = [table.keys[slot] for slot in slots], [table.parent_key(slot) for slot in slots]
            topic.events += [_stored(topic, run, above, kind) for run, above in _chains(keys, parents)]
        return end if end < len(table.keys) else None


def _stored(topic: _Topic, keys: list[bytes], parent: bytes, kind: int) -> BlockStored:
    above = None if parent == ROOT else parent
    tokens: list[int] = []
    if topic.tokens + len(keys) * topic.page_tokens <= TOKENS_MAX and all(key in topic.telling for key in keys):
        tokens = np.frombuffer(b"".join(topic.telling[key] for key in keys), "<u4").tolist()
        topic.tokens += len(tokens)
    return BlockStored(keys, above, tokens, topic.page_tokens, None, MEDIUM, None,
                       group_idx=topic.groups[kind], ownership=OWNER)  # fmt: skip


def _chains(keys: Sequence[bytes], parents: Sequence[bytes]) -> Iterator[tuple[list[bytes], bytes]]:
    """(keys that hang on each other, the key before the first)."""
    begin = 0
    for end in range(1, len(keys) + 1):
        if end == len(keys) or parents[end] != keys[end - 1]:
            yield list(keys[begin:end]), parents[begin]
            begin = end
