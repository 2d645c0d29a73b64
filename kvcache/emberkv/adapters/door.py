"""The door of an adapter to the cache: no call raises, or takes longer than its deadline; what fails is a miss.

Invariants:
  - What the operator has to put right (no access, no such tenant, another namespace) is raised when the door is made.
  - A service that is away makes no engine wait: the first call that fails takes `timeout_s`, and after it all others
    are misses at once, until a thread of ours, which asks once in `retry_s`, finds it again.
  - A buffer is left alone once the call that was handed it has returned: deadlines are those of the requests below,
    and nothing is abandoned half-way.
  - Pages have names (what an engine's own key says) and one payload; a page of another length is not there.
  - What was found is remembered while its lease lasts, so that a load needs no second look-up. Whether a page is there
    is never answered out of that memory.
  - It is its process's: in a forked child, which has none of its threads, all calls are misses.

Does not know: engines, or their threads. Each brings its own; ours asks whether a service is back, and nothing else.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from emberfs.errors import AccessDenied, DeadlineExceeded, EmberError, InvalidPath, LimitExceeded

from ..admission import ON_EVICT
from ..client import KVCache
from ..connect import connect
from ..errors import InvalidNamespace, NamespaceMismatch
from ..hit import GRANT_PAGES, Hit
from ..namespace import Namespace
from ..page import PLACE
from .settings import Settings

T = TypeVar("T")

log = logging.getLogger(__name__)

OPERATORS_BUSINESS = (AccessDenied, InvalidNamespace, InvalidPath, NamespaceMismatch)
FAILED = "failed"
"""What became of a page, beside what a put says."""
KEPT = frozenset({"stored", "known", "pending", "deferred"})
"""States of pages that the engine need not put again: they are there, will be, or are not worth it yet."""
SAYS_AGAIN_S = 60.0
"""The same trouble is logged so often."""
NAMES_MAX = 8192
"""In one request. The service does nothing else meanwhile, and takes no more than 65,536: a million tokens in SGLang's
seven pools of DeepSeek V4 are twice as many."""
FOUND_MAX = 1 << 16
"""Pages that are remembered; the longest known is forgotten first."""


@dataclass(slots=True)
class Counts:
    """What became of the calls through a door."""

    calls: int = 0
    failed: int = 0
    shut: int = 0
    """Misses at once, because the service was away a moment ago."""


class Door:
    """Calls of one engine on one namespace. Safe to use from many threads."""

    def __init__(
        self, settings: Settings, namespace: Namespace, *, now_s: Callable[[], float] = time.monotonic,
        open_cache: Callable[[Settings, Namespace], KVCache] | None = None,
        begin: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:  # fmt: skip
        """`begin` has something done behind the caller's back."""
        self.settings, self.namespace = settings, namespace
        self.counts = Counts()
        self._now_s = now_s
        self._open_cache = open_cache or open_cache_of
        self._begin = begin or in_a_thread
        self._cache: KVCache | None = None
        self._opening = threading.Lock()
        self._asking = threading.Lock()
        self._said_s = self._asked_s = float("-inf")
        self._is_shut = self._is_asking = self._is_closed = False
        self._process = os.getpid()
        self._found: dict[bytes, tuple[Hit, float]] = {}
        """Name -> the hit, and when its lease ends. In the order of that."""
        self._remembering = threading.Lock()
        try:
            self._opened()
        except OPERATORS_BUSINESS:
            raise
        except EmberError as error:
            self._failed(error)

    def __repr__(self) -> str:
        return f"<Door to {self.namespace.name} at {self.settings.address}>"

    @property
    def is_open(self) -> bool:
        """Calls go through, as far as we know."""
        return not (self._is_closed or self._is_shut) and os.getpid() == self._process

    def call(self, work: Callable[[KVCache], T], otherwise: T) -> T:
        """What `work` makes of the cache, or `otherwise`. Never raises an error of the cache."""
        self.counts.calls += 1
        if self._is_shut:
            self._ask_whether_it_is_back()
        if not self.is_open:
            self.counts.shut += 1
            return otherwise
        try:
            cache = self._opened()
            if cache is None:  # Another thread is at it.
                self.counts.shut += 1
                return otherwise
            return work(cache)
        except EmberError as error:
            if not self._is_closed:
                self._failed(error)
            return otherwise

    def find(self, names: Sequence[bytes]) -> list[int | None]:
        """How many bytes each page has; None: it is not there. Those that are stay for as long as a lease lasts."""
        return [None if hit is None else payload_bytes(hit) for hit in self._look_up(names)]

    def load(self, names: Sequence[bytes], buffers: Sequence[Any]) -> list[bool]:
        """Pages into `buffers`, one into each; which are there, right, and as long as that. Nobody needs to have
        looked them up before."""
        now_s = self._now_s()
        with self._remembering:
            found = [self._found.get(name) for name in names]
        hits = [None if each is None or each[1] < now_s else each[0] for each in found]
        missing = [index for index, hit in enumerate(hits) if hit is None]
        if missing:
            for index, hit in zip(missing, self._look_up([names[index] for index in missing]), strict=True):
                hits[index] = hit
        began_s = self._now_s()
        done = self.call(lambda cache: read_pages(cache, hits, buffers), [False] * len(buffers))
        if buffers and not any(done) and self._now_s() - began_s >= self.settings.timeout_s:
            self._failed(DeadlineExceeded(f"no page within {self.settings.timeout_s:g} s"))
        return done

    def forget(self, names: Sequence[bytes]) -> None:
        """These will not be loaded soon. Their leases end by themselves."""
        with self._remembering:
            for name in names:
                self._found.pop(name, None)

    def put(
        self, names: Sequence[bytes], buffers: Sequence[Any], before: bytes | None = None, *, chained: bool = True
    ) -> list[str]:
        """Keep pages, each after the one before it, the first after `before`; each for itself unless `chained`. What
        became of each: others find those that are kept from now on, and engines count on it. What would come after a
        page that is not there comes after none: nobody would find it, and engines put no page twice."""
        evicts = self.settings.policy == ON_EVICT  # The one before comes later.
        if before is not None and not evicts and self.find([before]) == [None]:
            before = None

        def work(cache: KVCache) -> list[str]:
            parent = None if before is None else cache.opaque_keys([before])[0]
            return cache.put(cache.opaque_keys(names), buffers, parent=parent, chained=chained, durable="committed")

        return self.call(work, [FAILED] * len(names))

    def remove(self, names: Sequence[bytes]) -> int:
        """Take pages out, with those after them. How many of the names were there."""
        self.forget(names)
        return sum(
            self.call(lambda cache, part=part: cache.remove(cache.opaque_keys(part)), 0)  # type: ignore[misc]
            for part in parts_of(names)
        )

    def close(self) -> None:
        """End it. Calls that are under way fail, and those that come are misses."""
        self._is_closed = True
        if os.getpid() != self._process:
            return
        with self._opening:
            cache, self._cache = self._cache, None
        if cache is not None:
            cache.close()

    def _look_up(self, names: Sequence[bytes]) -> list[Hit | None]:
        lease_s = self.settings.lease_s
        until_s = self._now_s() + lease_s
        hits: list[Hit | None] = []
        for part in parts_of(names):
            nothing: list[Hit | None] = [None] * len(part)

            def work(cache: KVCache, part: Sequence[bytes] = part) -> list[Hit | None]:
                return cache.lookup(cache.opaque_keys(part), lease_s=lease_s)

            hits += self.call(work, nothing)
        with self._remembering:
            for name, hit in zip(names, hits, strict=True):
                self._found.pop(name, None)
                if hit is not None:
                    self._found[name] = hit, until_s
            while len(self._found) > FOUND_MAX:
                del self._found[next(iter(self._found))]
        return hits

    def _opened(self) -> KVCache | None:
        cache = self._cache
        if cache is not None:
            return cache
        if not self._opening.acquire(blocking=False):
            return None
        try:
            if self._cache is None and not self._is_closed:
                self._cache = self._open_cache(self.settings, self.namespace)
            return self._cache
        finally:
            self._opening.release()

    def _ask_whether_it_is_back(self) -> None:
        """Unless we asked a moment ago, or are waiting for the answer."""
        if self._is_closed or os.getpid() != self._process:
            return
        with self._asking:
            if self._is_asking or self._now_s() < self._asked_s + self.settings.retry_s:
                return
            self._is_asking = True
        try:
            self._begin(self._ask)
        except RuntimeError:  # Python is ending, and starts no threads.
            self._is_asking = False

    def _ask(self) -> None:
        try:
            cache = self._opened()
            if cache is not None:
                cache.exists([])
                self._is_shut = False
        except EmberError as error:
            if not self._is_closed:
                self._failed(error)
        finally:
            self._is_asking = False

    def _failed(self, error: EmberError) -> None:
        self.counts.failed += 1
        now_s = self._now_s()
        if not isinstance(error, LimitExceeded):  # One page too large says nothing about the others.
            self._is_shut, self._asked_s = True, now_s
        if now_s >= self._said_s + SAYS_AGAIN_S:
            self._said_s = now_s
            log.warning("KV cache at %s: %s; what it would have had is computed", self.settings.address, error)


def in_a_thread(work: Callable[[], None]) -> None:
    """Done soon, unless the process ends before."""
    threading.Thread(target=work, name="emberkv-door", daemon=True).start()


def open_cache_of(settings: Settings, namespace: Namespace) -> KVCache:
    """A cache whose calls keep the deadline."""
    given: dict[str, Any] = {
        "tenant": settings.tenant,
        "salt": settings.salt.encode(),
        "token": settings.token,
        "policy": settings.policy,
        "timeout_s": settings.timeout_s,
        "store": settings.store,
        "tls": settings.tls,
        "grants": settings.grants,
    }
    if settings.credentials is not None:
        given["credentials"] = settings.credentials
    deadlines: dict[str, Any] = {"deadline_s": settings.timeout_s, "connect_timeout_s": settings.timeout_s}
    try:
        return connect(settings.address, namespace, shares_memory=settings.shares_memory, **given, **deadlines)
    except InvalidPath:
        # An embedded store, which only the service tells: it has no such settings, nor a network.
        return connect(settings.address, namespace, **given)


# --- hits of one page each, read together ----------------------------------------------------------------------------


def parts_of(names: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """As many as go in one request."""
    for begin in range(0, len(names), NAMES_MAX):
        yield names[begin : begin + NAMES_MAX]


def payload_bytes(hit: Hit) -> int:
    """Of the first page of a hit of a namespace with one kind."""
    length: int = PLACE.unpack_from(hit.places[0])[2]
    return length


def read_pages(cache: KVCache, hits: Sequence[Hit | None], buffers: Sequence[Any]) -> list[bool]:
    """Page i of `hits`, of one page each, into `buffers[i]`, all in one read; which are there, right, and as long."""
    wanted = [
        index
        for index, (hit, buffer) in enumerate(zip(hits, buffers, strict=True))
        if hit is not None and payload_bytes(hit) == memoryview(buffer).nbytes
    ]
    done = [False] * len(buffers)
    together: dict[tuple[bytes, ...], list[tuple[int, Hit]]] = {}
    """By what they are read under."""
    for index in wanted:
        if (hit := hits[index]) is not None:
            together.setdefault(hit.grants, []).append((index, hit))
    for grants, chosen in together.items():
        indices, found = zip(*chosen, strict=True)
        joined = joined_hit(found, grants * -(-len(found) // GRANT_PAGES))
        for index, good in zip(indices, cache.get_into(joined, [buffers[index] for index in indices]), strict=True):
            done[index] = good
    return done


def joined_hit(hits: Sequence[Hit], grants: tuple[bytes, ...]) -> Hit:
    """One of all pages of hits of one kind. It has no lease."""
    return Hit(
        pages=len(hits), tokens=sum(hit.tokens for hit in hits), reason="whole", lease=0,
        chain=b"".join(hit.chain for hit in hits), places=(b"".join(hit.places[0] for hit in hits),),
        tenant=hits[0].tenant, grants=grants,
    )  # fmt: skip
