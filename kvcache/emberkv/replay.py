"""A trace against a service, with bytes: each request matches, reads what it hits, and puts the rest.

What `simulate` says of the service's own policy, this measures. Requests follow each other without a pause and one at
a time, so that what was put before is there; when they came is not looked at. Each id of the trace is a page with a key
of its own, chained as the trace has it, and a payload that is made of its key.

Does not know: what a hit is worth, or whose clock it is handed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from emberfs.histogram import Histogram

from .client import KVCache
from .keys import KEY_BYTES
from .namespace import Kind, Namespace
from .trace import Request, Trace

BATCH_PAGES = 256
LEASE_S = 60.0
REMOVE_PAGES = 2048
"""In one request: the service does nothing else meanwhile."""


@dataclass(slots=True)
class Replayed:
    """What came of a trace."""

    pages: int = 0
    hit_pages: int = 0
    """Matched and read. What was matched and could not be read is `lost_pages`."""
    lost_pages: int = 0
    wrong_pages: int = 0
    """Read as good, and not what was put. There are none."""
    tokens: int = 0
    hit_tokens: int = 0
    requests: int = 0
    hit_requests: int = 0
    read_bytes: int = 0
    stored_bytes: int = 0
    puts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Why matches were no longer."""
    seconds: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram() for name in ("match", "get", "put", "flush")}
    )
    """Of each call: a match of all pages of a request, reads and puts of up to 256, and a flush of what it put."""
    hits: list[int] = field(default_factory=list)
    """The tokens of each request's hit."""

    @property
    def page_rate(self) -> float:
        return self.hit_pages / self.pages if self.pages else 0.0

    @property
    def token_rate(self) -> float:
        return self.hit_tokens / self.tokens if self.tokens else 0.0


def replay_namespace(trace: Trace, page_bytes: int) -> Namespace:
    """Where pages of replays lie."""
    kinds = (Kind("kv", payload_bytes=page_bytes),)
    return Namespace(model="emberline-replay", dtype="bytes", layout="none", page_tokens=trace.page_tokens, kinds=kinds)


class Replay:
    """One run of a trace. Its keys are its own by the cache's salt."""

    def __init__(self, cache: KVCache, trace: Trace, page_bytes: int, *, now_s: Callable[[], float]) -> None:
        self.found = Replayed()
        self._cache, self._trace, self._page_bytes, self._now_s = cache, trace, page_bytes, now_s
        self._keys: dict[int, bytes] = {}
        """In the order in which pages came up: each after the one it hangs on."""
        memory = cache.buffer(BATCH_PAGES * page_bytes)
        self._buffers = [memory[i * page_bytes : (i + 1) * page_bytes] for i in range(BATCH_PAGES)]

    def run(self, advance: Callable[[int], None] = lambda _: None) -> Replayed:
        """All of it; `advance` is told the bytes of each request. Raises Unavailable, DeadlineExceeded."""
        for request in self._trace.requests:
            self._request(request)
            advance(len(request.pages) * self._page_bytes)
        return self.found

    def remove(self) -> None:
        """Take its pages out, leaves first."""
        keys = list(reversed(self._keys.values()))
        for begin in range(0, len(keys), REMOVE_PAGES):
            self._cache.remove(keys[begin : begin + REMOVE_PAGES])

    def _request(self, request: Request) -> None:
        found, keys = self.found, self._keys_of(request.pages)
        began_s = self._now_s()
        hit = self._cache.match(keys, lease_s=LEASE_S)
        found.seconds["match"].record(self._now_s() - began_s)
        read = 0
        for first in range(0, hit.pages, BATCH_PAGES):
            buffers = self._buffers[: hit.pages - first]
            began_s = self._now_s()
            good = self._cache.get_into(hit, buffers, first=first)
            found.seconds["get"].record(self._now_s() - began_s)
            for key, buffer, is_good in zip(keys[first:], buffers, good, strict=False):
                found.wrong_pages += is_good and bytes(buffer) != self._payload(key)
            count = good.index(False) if False in good else len(good)
            read += count
            if count < len(good):
                break
        tokens = request.tokens_of(read, self._trace.page_tokens)
        found.requests += 1
        found.pages += len(keys)
        found.tokens += request.input_tokens
        found.hit_pages += read
        found.lost_pages += hit.pages - read
        found.hit_tokens += tokens
        found.hit_requests += read > 0
        found.read_bytes += read * self._page_bytes
        found.reasons[hit.reason] += 1
        found.hits.append(tokens)
        self._cache.release(hit)  # What lies where it reads cannot make room for what is put.
        self._put(keys, read)

    def _put(self, keys: Sequence[bytes], first: int) -> None:
        for begin in range(first, len(keys), BATCH_PAGES):
            batch = keys[begin : begin + BATCH_PAGES]
            payloads = [self._payload(key) for key in batch]
            began_s = self._now_s()
            states = self._cache.put(batch, payloads, parent=keys[begin - 1] if begin else None)
            self.found.seconds["put"].record(self._now_s() - began_s)
            self.found.puts.update(states)
            self.found.stored_bytes += states.count("stored") * self._page_bytes
        if first < len(keys):
            began_s = self._now_s()
            self._cache.flush()  # The next request finds them.
            self.found.seconds["flush"].record(self._now_s() - began_s)

    def _keys_of(self, pages: Sequence[int]) -> list[bytes]:
        fresh = [page for page in pages if page not in self._keys]
        keys = self._cache.opaque_keys([page.to_bytes(8, "little") for page in fresh])
        self._keys.update(zip(fresh, keys, strict=True))
        return [self._keys[page] for page in pages]

    def _payload(self, key: bytes) -> bytes:
        return (key * (self._page_bytes // KEY_BYTES + 1))[: self._page_bytes]
