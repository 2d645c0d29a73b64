"""`KVCache`: the blocking door to a KV-cache service, and to the pages themselves.

The service says where pages lie; their bytes are read from and written to the storage servers directly, into and out of
the caller's memory. Safe to use from many threads. A service that went and came back is found again; several addresses
are tried in turn. One that does not answer several times in a row is left alone for a while (`breaker`): until then
nothing is there, puts are refused, and what cannot be answered so raises BreakerOpen.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import emberfs
from emberfs import Client, StoreClosed
from emberfs.client.buffers import writable_view
from emberfs.errors import EmberError, LimitExceeded
from emberfs.transport import TcpConfig
from msgspec.structs import replace

from . import messages
from .breaker import BreakerConfig
from .caller import Caller
from .errors import BreakerOpen
from .hit import GRANT_PAGES, Browsed, Hit
from .journal import split
from .keys import KEY_BYTES, ROOT, opaque_keys, page_keys, token_bytes
from .namespace import Namespace
from .opening import GrantedSegments, SegmentFiles
from .page import NO_PLACE, PLACE, places_of
from .prefetch import Prefetch
from .putting import Putter
from .reading import PageReader
from .writing import Copied, PageWriter


class KVCache:
    """A namespace of a service, as one tenant. Get one from `emberkv.connect`."""

    def __init__(
        self, address: str, namespace: Namespace, *, tenant: str, salt: bytes, token: str, policy: str,
        timeout_s: float, store: str | None, grants: bool, tcp: TcpConfig, store_settings: dict[str, Any],
        breaker: BreakerConfig,
    ) -> None:  # fmt: skip
        self.namespace, self.tenant, self.salt = namespace, tenant, salt
        self.refusal = ""
        """Why storage servers refused what was read last, of all that was refused; "": nothing ever was."""
        self._token, self._grants = token, grants
        self._kinds = {kind.name: number for number, kind in enumerate(namespace.kinds)}
        self._caller = Caller(
            address,
            namespace,
            tenant=tenant,
            token=token,
            policy=policy,
            timeout_s=timeout_s,
            tcp=tcp,
            breaker=breaker,
        )
        self._lock = threading.Lock()
        self._is_reporting = False
        self._store: Client | None = None
        self._readers: list[PageReader] = []
        self._prefetches: set[Prefetch] = set()
        self._putter = Putter(self._caller, self._page_writer, grants=grants)
        try:
            seat = self._caller.seated()
            self._segments = seat.segments
            self._store = emberfs.connect(store or seat.store, **store_settings)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<emberkv.KVCache {self.namespace.name} at {','.join(self._caller.addresses)}>"

    # --- keys ------------------------------------------------------------------------------------------------------

    def keys(self, tokens: Any, *, parent: bytes | None = None) -> list[bytes]:
        """The keys of the whole pages of `tokens`, 32 bytes each; `parent` is the key of the page before them."""
        return page_keys(self.namespace, tokens, tenant=self.tenant, salt=self.salt, parent=parent or ROOT)

    def opaque_keys(self, engine_keys: Sequence[bytes]) -> list[bytes]:
        """Keys for an engine's own keys, which say all there is to say about a page."""
        return opaque_keys(self.namespace, engine_keys, tenant=self.tenant, salt=self.salt)

    # --- reading ---------------------------------------------------------------------------------------------------

    def match(self, keys: Sequence[bytes], *, lease_s: float = 30.0) -> Hit:
        """The longest usable prefix of a chain, with a lease on it: its pages stay for `lease_s` at least.

        Raises Unavailable, DeadlineExceeded.
        """
        return self.match_many([keys], lease_s=lease_s)[0]

    def match_many(self, chains: Sequence[Sequence[bytes]], *, lease_s: float = 30.0) -> list[Hit]:
        """`match` of several chains in one round trip."""
        blobs = [b"".join(chain) for chain in chains]
        try:
            answer = self._caller.ask(lambda seat: messages.Match(seat, blobs, lease_s, self._grants), messages.Matched)
        except BreakerOpen:
            nothing = (b"",) * len(self._kinds)
            return [Hit(0, 0, "no answer", 0, blob, nothing, 0) for blob in blobs]
        hits, begin, tenant = [], 0, self._caller.seated().number
        known, partings = answer.known or answer.pages, answer.partings or [0] * len(blobs)
        granted = answer.grants or [[]] * len(blobs)
        for blob, pages, reason, lease, there, parts_at, grants in zip(
            blobs, answer.pages, answer.reasons, answer.leases, known, partings, granted, strict=True
        ):
            end = begin + pages * PLACE.size
            places = tuple(column[begin:end] for column in answer.places)
            tokens = pages * self.namespace.page_tokens
            hits.append(Hit(pages, tokens, reason, lease, blob, places, tenant, there, parts_at, tuple(grants)))
            begin = end
        return hits

    def lookup(self, keys: Sequence[bytes], *, kind: str | None = None, lease_s: float = 30.0) -> list[Hit | None]:
        """Each key for itself, whatever lies before it: a hit of one page, or None. One lease is on all of them."""
        number, blob = self._kind(kind), b"".join(keys)
        try:
            answer = self._caller.ask(
                lambda seat: messages.Lookup(seat, number, blob, lease_s, self._grants), messages.LookedUp
            )
        except BreakerOpen:
            return [None] * len(keys)
        hits: list[Hit | None] = [None] * len(keys)
        tenant, page_tokens = self._caller.seated().number, self.namespace.page_tokens
        before, after = (NO_PLACE,) * number, (NO_PLACE,) * (len(self._kinds) - number - 1)
        for page, (key, place) in enumerate(zip(keys, split(answer.places, PLACE.size), strict=True)):
            if place != NO_PLACE:
                grants = (answer.grants[page // GRANT_PAGES],) if answer.grants else ()
                places = (*before, place, *after)
                hits[page] = Hit(1, page_tokens, "whole", answer.lease, bytes(key), places, tenant, grants=grants)
        return hits

    def exists(self, keys: Sequence[bytes], *, kind: str | None = None) -> list[bool]:
        """Which of the pages are there, each for itself, without a lease."""
        number, blob = self._kind(kind), b"".join(keys)
        try:
            answer = self._caller.ask(lambda seat: messages.Lookup(seat, number, blob, 0.0), messages.LookedUp)
        except BreakerOpen:
            return [False] * len(keys)
        return [place != NO_PLACE for place in split(answer.places, PLACE.size)]

    def browse(self, after: int = 0, *, count: int = 1024, lease_s: float = 0.0) -> Browsed:
        """Some of this tenant's pages, which are no chain. Go on from `next` of what this returns, until that is 0.

        A page that is put or goes meanwhile may be told or not; others are told once.
        """
        tenant = self._caller.seated().number
        answer = self._caller.ask(lambda seat: messages.Browse(seat, after, count, lease_s), messages.Browsed)
        pages, places = len(answer.keys) // KEY_BYTES, tuple(answer.places)
        tokens = pages * self.namespace.page_tokens
        hit = Hit(pages, tokens, "whole", answer.lease, answer.keys, places, tenant)
        return Browsed(hit, split(answer.parents, KEY_BYTES), answer.next)

    def buffer(self, size: int) -> memoryview:
        """Memory that storage servers of this host fill in place: the quickest to read into."""
        return self._files().buffer(size)

    def get_into(
        self, hit: Hit, buffers: Sequence[Any], *, kind: str | None = None, first: int = 0, begin: int = 0,
        reports: bool = True,
    ) -> list[bool]:  # fmt: skip
        """Read the pages of a hit, from page `first` on, one into each buffer; which of them are there and right.

        A buffer of the payload's size gets all of it. A shorter one gets the bytes from `begin` on: a layer, or some
        heads. Never raises for a page that was evicted or damaged: that is False, and a damaged one is reported, if
        `reports`, behind the caller's back.
        Raises LimitExceeded for pages that the hit has not, and for more bytes than a page has.
        """
        number = self._kind(kind)
        views = [writable_view(buffer) for buffer in buffers]
        if first < 0 or first + len(views) > hit.pages:
            raise LimitExceeded(f"the hit has {hit.pages} pages: not {len(views)} from {first} on")
        if begin < 0:
            raise LimitExceeded(f"a page has no byte {begin}")
        keys = hit.keys_of(first, len(views))
        places = hit.places[number][first * PLACE.size : (first + len(views)) * PLACE.size]
        for view, (segment, _, length, _) in zip(views, PLACE.iter_unpack(places), strict=True):
            if segment and begin + len(view) > length:
                raise LimitExceeded(f"the page has {length} bytes: not {len(view)} from {begin} on")
        grants = hit.grants_of(first, len(views))
        with self._reader() as reader:
            done = reader.read(keys, places, views, kind=number, tenant=hit.tenant, begin=begin, grants=grants)
            is_refused = self._note_refusal(reader)
        if reports and not all(done) and not is_refused:
            self._report(number, [key for key, good in zip(keys, done, strict=True) if not good])
        return done

    def prefetch(
        self, hit: Hit, buffers: Sequence[Any], *, kind: str | None = None, first: int = 0, layers: int = 1,
        deadline_s: float | None = None,
    ) -> Prefetch:  # fmt: skip
        """Begin to read the pages of a hit, from page `first` on, one into each buffer of the payload's size.

        With `layers`, each payload is so many slices of one size: the first of all pages comes first, and can be waited
        for alone. After `deadline_s` seconds nothing more is read: pages that are not there by then are misses. The
        buffers must not be touched before the `Prefetch` says so. Raises LimitExceeded.
        """
        number, views = self._kind(kind), [writable_view(buffer) for buffer in buffers]
        if first < 0 or first + len(views) > hit.pages:
            raise LimitExceeded(f"the hit has {hit.pages} pages: not {len(views)} from {first} on")
        grants = hit.grants_of(first, len(views))
        keys, places = hit.keys_of(first, len(views)), places_of(hit.places[number])[first : first + len(views)]
        for view, place in zip(views, places, strict=True):
            if place.segment and len(view) != place.length:
                raise LimitExceeded(f"the page has {place.length} bytes: not {len(view)}")
        sizes = {len(view) for view in views}
        if layers < 1 or (layers > 1 and (len(sizes) > 1 or any(size % layers for size in sizes))):
            raise LimitExceeded(f"pages of {sizes} bytes have not {layers} layers of one size")
        ends_s = None if deadline_s is None else self._caller.runtime.now_s() + deadline_s

        def read(pages: Sequence[int], parts: Sequence[memoryview], layer: int) -> list[bool]:
            mine, asked = [keys[page] for page in pages], b"".join(PLACE.pack(*places[page]) for page in pages)
            begin, under = layer * len(parts[0]), [grants[page] for page in pages] if grants else []
            with self._reader() as reader:
                done = reader.read(mine, asked, parts, kind=number, tenant=hit.tenant, begin=begin, grants=under)
                is_refused = self._note_refusal(reader)
            if not all(done) and not is_refused:
                self._report(number, [key for key, good in zip(mine, done, strict=True) if not good])
            return done

        prefetch = Prefetch(
            views, layers=layers, has_time=lambda: ends_s is None or self._caller.runtime.now_s() < ends_s, read=read
        )

        def run() -> None:
            prefetch.run()
            with self._lock:
                self._prefetches.discard(prefetch)

        with self._lock:
            self._prefetches.add(prefetch)
        threading.Thread(target=run, name="emberkv-prefetch", daemon=True).start()
        return prefetch

    def get(self, hit: Hit, *, kind: str | None = None) -> list[bytes | None]:
        """The pages of a hit; None for one that cannot be had any more."""
        lengths = [place.length for place in places_of(hit.places[self._kind(kind)])]
        buffers = [bytearray(length) for length in lengths]
        done = self.get_into(hit, buffers, kind=kind) if buffers else []
        return [bytes(buffer) if good else None for buffer, good in zip(buffers, done, strict=True)]

    def report(self, keys: Sequence[bytes], *, kind: str | None = None) -> int:
        """Have the service look at pages that could not be read; those that are damaged go. How many went."""
        number, gone = self._kind(kind), 0
        for begin in range(0, len(keys), messages.REPORTED_MAX):
            blob = b"".join(keys[begin : begin + messages.REPORTED_MAX])
            gone += self._caller.ask(partial(messages.Report, kind=number, keys=blob), messages.Okay).count
        return gone

    def release(self, *hits: Hit) -> None:
        """End the leases. Not needed: they end by themselves."""
        leases = [hit.lease for hit in hits if hit.lease]
        if leases:
            with contextlib.suppress(BreakerOpen):
                self._caller.ask(lambda seat: messages.Release(seat, leases), messages.Okay)

    def extend(self, hit: Hit, *, lease_s: float = 30.0) -> Hit | None:
        """Let a lease last for `lease_s` from now: the hit to go on with, whose grants last, too. None: it was over."""
        if not hit.grants:
            goes_on = self._caller.ask(lambda seat: messages.Extend(seat, hit.lease, lease_s), messages.Okay).count
            return hit if goes_on else None
        grants = list(hit.grants)
        renewed = self._caller.ask(
            lambda seat: messages.Renew(seat, hit.lease, lease_s, grants), messages.Renewed
        ).grants
        return replace(hit, grants=tuple(renewed)) if renewed else None

    # --- writing ---------------------------------------------------------------------------------------------------

    def put(
        self, keys: Sequence[bytes], payloads: Sequence[Any], *, parent: bytes | None = None, kind: str | None = None,
        durable: str = "buffered", chained: bool = True, tokens: Any = None,
    ) -> list[str]:  # fmt: skip
        """Store pages: "stored", "known" (there already), "pending" (another writer is at it), "refused" (no room),
        "deferred" (by the policy of second use, not before it is put again).

        keys[i] comes after keys[i-1], and the first after `parent`; not `chained`, each stands for itself. "committed"
        returns when pages and index are durable. "buffered" returns when the pages are copied: they are written behind
        the caller's back, some tens of MiB at most, and found a few milliseconds later; `flush` waits for that, and
        says if it failed. The same put again is harmless. `tokens` are those of all the pages, for routers that follow
        KV events; they are sent if the service publishes them. Raises Unavailable, DeadlineExceeded.
        """
        if durable not in ("buffered", "committed"):
            raise ValueError(f"durable is 'buffered' or 'committed', not {durable!r}")
        if len(keys) != len(payloads):
            raise ValueError(f"{len(keys)} keys need as many payloads, not {len(payloads)}")
        size = 4 * self.namespace.page_tokens
        data = b"" if tokens is None else token_bytes(tokens)
        if tokens is not None and len(data) != size * len(keys):
            raise ValueError(f"{len(keys)} pages have {len(keys) * size // 4} tokens, not {len(data) // 4}")
        pieces = [data[begin : begin + size] for begin in range(0, len(data), size)]
        is_durable = durable == "committed"
        try:
            return self._putter.put(
                self._kind(kind),
                keys,
                payloads,
                parent=parent,
                durable=is_durable,
                chained=chained,
                tokens=pieces,
            )
        except BreakerOpen:
            return ["refused"] * len(keys)

    def flush(self) -> None:
        """What was put before is committed when this returns. Raises what befell it, if it is not."""
        self._putter.flush()

    def remove(self, keys: Sequence[bytes]) -> int:
        """Take pages out, with all that come after them. How many of the keys were there."""
        blob = b"".join(keys)
        return self._caller.ask(lambda seat: messages.Remove(seat, blob), messages.Okay).count

    def pin(self, keys: Sequence[bytes], for_s: float) -> int:
        """Keep pages, and those before them, for so long. How many of the keys were there."""
        blob = b"".join(keys)
        return self._caller.ask(lambda seat: messages.Pin(seat, blob, for_s), messages.Okay).count

    def stat(self) -> dict[str, Any]:
        """Numbers of the service, as far as the token may see them, and under "client" what `health` tells."""
        told = self._caller.call(messages.Stat(self._token, self.tenant), messages.Numbers)
        found: dict[str, Any] = json.loads(told.json)
        return {**found, "client": self.health}

    @property
    def health(self) -> dict[str, Any]:
        """Of the way to the service, without asking it: see `Breaker.figures`."""
        return self._caller.breaker.figures()

    # --- the service -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Write what was put, and end. Leases end by themselves. Closing twice is allowed.

        In a process that was forked from ours it only lets go: the other one goes on, and writes what it put.
        """
        if not self._caller.is_ours:  # First of all: another thread may have held the locks when it forked.
            self._caller.forget_after_fork()
            return
        with self._lock:
            if self._caller.is_closed:
                return
            self._caller.is_closed = True
            prefetches = list(self._prefetches)
        for prefetch in prefetches:
            prefetch.cancel()
        with self._lock:
            readers, self._readers = self._readers, []
        with contextlib.suppress(EmberError):
            self._putter.close()
            self._caller.leave()
        for reader in readers:
            with contextlib.suppress(EmberError):
                reader.close()
        if self._store is not None:
            self._store.close()
        self._caller.close()

    def __enter__(self) -> KVCache:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _page_writer(self, commit: Callable[[Sequence[Copied]], None]) -> PageWriter:
        store = self._files()
        segments = GrantedSegments(store) if self._grants else SegmentFiles(store, self._segments)
        return PageWriter(store, segments, commit)

    def _files(self) -> Client:
        if self._store is None or self._caller.is_closed:
            raise StoreClosed("this KVCache was closed")
        self._caller.check_process()
        return self._store

    @contextlib.contextmanager
    def _reader(self) -> Iterator[PageReader]:
        with self._lock:
            reader = self._readers.pop() if self._readers else None
        if reader is None:
            reader = PageReader(self._files(), self._segments)
        try:
            yield reader
        finally:
            with self._lock:
                self._readers.append(reader)

    def _note_refusal(self, reader: PageReader) -> bool:
        """The last read of `reader` was refused: nothing to report, the pages may be as good as ever."""
        self.refusal = reader.refusal or self.refusal
        return bool(reader.refusal)

    def _report(self, kind: int, keys: Sequence[bytes]) -> None:
        """Tell the service, behind the caller's back: the pages are misses either way."""
        if self._is_reporting:
            return
        self._is_reporting = True
        blob = b"".join(keys[: messages.REPORTED_MAX])

        def is_over() -> None:
            self._is_reporting = False

        self._caller.post(lambda seat: messages.Report(seat, kind, blob), is_over=is_over)

    def _kind(self, name: str | None) -> int:
        if name is None:
            return 0
        if name not in self._kinds:
            raise LimitExceeded(f"no kind {name!r} in this namespace: there are {', '.join(self._kinds)}")
        return self._kinds[name]
