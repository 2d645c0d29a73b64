"""The KV-cache service: requests onto namespaces, for those who may.

Invariants: page bytes never pass through here. What a tenant asks is looked up among its own pages only.

Does not know: sockets, or where the files are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

from emberfs import NotFound
from emberfs.errors import AccessDenied, EmberError, LimitExceeded, ProtocolError, Unavailable
from emberfs.messages import Foreign, Message
from emberfs.runtime import Runtime
from msgspec.structs import replace

from . import messages
from .admission import ON_EVICT, PUT_POLICIES
from .counts import ServiceCounts
from .errors import KvError, SeatGone, StaleOwner
from .events import EventFeed
from .figures import Figures, requests_of, stat_of
from .files import Files
from .grants import Granter
from .journal import split
from .keys import KEY_BYTES
from .leases import LEASE_S_MAX
from .page import PAGE_BYTES_MAX, PLACE
from .parting import parting
from .pools import NAMESPACES_MAX, Pools
from .seats import Seat, Seats
from .space import SpaceConfig
from .table import NO_STATE
from .tenants import EVERYBODY, Tenants

CHAINS_MAX = 1024
KEYS_MAX = 65_536
"""In one request."""
PIN_S_MAX = 30 * 86_400.0
TTL_S_MAX = 10 * 365 * 86_400.0


class KvService:
    """See the module. `address` is where others reach it, `store` the URL that its clients read pages from."""

    def __init__(
        self, files: Files, runtime: Runtime, *, root: str, store: str, config: SpaceConfig, address: str = "",
        tenants: Tenants = EVERYBODY, namespaces_max: int = NAMESPACES_MAX, counts: ServiceCounts | None = None,
        events: EventFeed | None = None, granter: Granter | None = None,
    ) -> None:  # fmt: skip
        self.counts = counts or ServiceCounts()
        self.pools = Pools(files, runtime, root=root, config=config, namespaces_max=namespaces_max,
                           counts=self.counts, events=events, address=address)  # fmt: skip
        self._runtime, self._store, self._tenants = runtime, store, tenants
        self._events, self._granter = events, granter
        self._seats = Seats(runtime)
        self._upkeep: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look after seats."""
        self._upkeep = self._runtime.spawn(self._seats.keep_up(), "kv-seats")

    async def close(self) -> None:
        """Let every namespace go."""
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.wait([self._upkeep])
        await self.pools.close()

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        """Serve one request."""
        if not isinstance(request, Foreign):
            raise ProtocolError("this is a KV-cache service; a store is at another address")
        ask = messages.decode_ask(request)
        began_s, failed = self._runtime.now_s(), ""
        try:
            work = _HANDLERS[type(ask)](self, ask)
            return messages.encode_answer(work if isinstance(work, messages.Answer) else await work)
        except EmberError as error:
            failed = type(error).__name__
            if isinstance(error, StaleOwner):
                return messages.encode_error(SeatGone(str(error)))  # Whoever serves it now gives a new one.
            if isinstance(error, KvError):
                return messages.encode_error(error)
            raise
        finally:
            self.counts.served(type(ask).__name__, self._runtime.now_s() - began_s, failed)

    # --- seats -----------------------------------------------------------------------------------------------------

    async def _open(self, ask: messages.Open) -> messages.Answer:
        self._tenants.check(ask.tenant, ask.token)
        if ask.policy not in PUT_POLICIES:
            raise ProtocolError(f"pages are put {', '.join(PUT_POLICIES)}, not {ask.policy!r}")
        try:
            pool = await self.pools.get(ask.namespace)
        except StaleOwner as error:
            raise Unavailable("another server has just taken this namespace over: ask that one") from error
        if ask.policy == ON_EVICT:
            pool.space.patient.add(pool.tenant(ask.tenant))
        wants_tokens = self._events is not None and self._events.tells_tokens
        seat = self._seats.take(pool, pool.tenant(ask.tenant), ask.policy)
        return messages.Opened(seat.number, seat.tenant, self._store, f"{pool.directory}/segments", wants_tokens)

    def _close(self, ask: messages.Close) -> messages.Answer:
        self._seats.leave(self._seats.of(ask.seat))
        return messages.Okay()

    # --- reading ---------------------------------------------------------------------------------------------------

    def _match(self, ask: messages.Match) -> messages.Answer | Awaitable[messages.Answer]:
        seat = self._seats.of(ask.seat)
        if len(ask.chains) > CHAINS_MAX:
            raise LimitExceeded(f"{len(ask.chains)} chains in one request: at most {CHAINS_MAX}")
        pool, tenant, lease_s = seat.pool, seat.tenant, _seconds(ask.lease_s, LEASE_S_MAX)
        if sum(map(len, ask.chains)) > KEYS_MAX * KEY_BYTES:
            raise LimitExceeded(f"more than {KEYS_MAX} keys in one request")
        counts, reasons, leases, found = [], [], [], []
        for chain in ask.chains:
            _check_keys(chain)
            slots, reason, lease = pool.match(tenant, chain, lease_s)
            counts.append(len(slots))
            reasons.append(reason)
            leases.append(lease)
            found.append(slots)
        packed, kinds = pool.table.packed, range(len(pool.table.places))
        places = [b"".join([packed(slots, kind) for slots in found]) for kind in kinds]
        answer = messages.Matched(counts, reasons, leases, places)
        if NO_STATE in reasons:
            hints = [
                parting(pool.table, tenant, _keys(chain), pages) if reason == NO_STATE else (pages, 0)
                for chain, pages, reason in zip(ask.chains, counts, reasons, strict=True)
            ]
            known, partings = map(list, zip(*hints, strict=True))
            pool.counts.partings += len(partings) - partings.count(0)
            answer = replace(answer, known=known, partings=partings)
        return self._granted_match(seat, lease_s, answer) if ask.grants else answer

    async def _granted_match(self, seat: Seat, lease_s: float, answer: messages.Matched) -> messages.Answer:
        grants, begin = [], 0
        for pages, lease in zip(answer.pages, answer.leases, strict=True):
            end = begin + pages * PLACE.size
            grants.append(await self._grants(seat, [column[begin:end] for column in answer.places], lease, lease_s))
            begin = end
        return replace(answer, grants=grants)

    async def _granted_lookup(self, seat: Seat, lease_s: float, answer: messages.LookedUp) -> messages.Answer:
        return replace(answer, grants=await self._grants(seat, [answer.places], answer.lease, lease_s))

    async def _grants(self, seat: Seat, columns: Sequence[bytes], lease: int, lease_s: float) -> list[bytes]:
        tenant, segments = seat.pool.index.tenants[seat.tenant], f"{seat.pool.directory}/segments"
        return await self._signer().grants(segments, columns, tenant=tenant, lease=lease, lease_s=lease_s)

    def _signer(self) -> Granter:
        if self._granter is None:
            raise AccessDenied("this service makes no grants: it was not told a key")
        return self._granter

    def _lookup(self, ask: messages.Lookup) -> messages.Answer | Awaitable[messages.Answer]:
        seat, lease_s = self._seats.of(ask.seat), _seconds(ask.lease_s, LEASE_S_MAX)
        places, lease = seat.pool.lookup(seat.tenant, _kind(seat, ask.kind), _keys(ask.keys), lease_s)
        answer = messages.LookedUp(b"".join(places), lease)
        return self._granted_lookup(seat, lease_s, answer) if ask.grants else answer

    def _release(self, ask: messages.Release) -> messages.Answer:
        seat = self._seats.of(ask.seat)
        return messages.Okay(seat.pool.leases.release(set(ask.leases), owner=seat.tenant))

    def _extend(self, ask: messages.Extend) -> messages.Answer:
        seat, lease_s, now_s = self._seats.of(ask.seat), _seconds(ask.lease_s, LEASE_S_MAX), self._runtime.now_s()
        goes_on = seat.pool.leases.extend(ask.lease, owner=seat.tenant, duration_s=lease_s, now_s=now_s)
        return messages.Okay(int(goes_on))

    def _renew(self, ask: messages.Renew) -> messages.Answer:
        seat, lease_s, now_s = self._seats.of(ask.seat), _seconds(ask.lease_s, LEASE_S_MAX), self._runtime.now_s()
        tenant = seat.pool.index.tenants[seat.tenant]
        grants = self._signer().renewed(ask.grants, tenant=tenant, lease=ask.lease, lease_s=lease_s)
        goes_on = seat.pool.leases.extend(ask.lease, owner=seat.tenant, duration_s=lease_s, now_s=now_s)
        return messages.Renewed(grants if goes_on else [])

    async def _report(self, ask: messages.Report) -> messages.Answer:
        seat = self._seats.of(ask.seat)
        keys = _keys(ask.keys)[: messages.REPORTED_MAX]
        return messages.Okay(await seat.pool.report(seat.tenant, _kind(seat, ask.kind), keys))

    def _browse(self, ask: messages.Browse) -> messages.Answer:
        seat, lease_s = self._seats.of(ask.seat), _seconds(ask.lease_s, LEASE_S_MAX)
        if not (0 < ask.count <= KEYS_MAX and ask.after >= 0):
            raise ProtocolError(f"a request tells of 1 to {KEYS_MAX} pages, from 0 on")
        table = seat.pool.table
        slots, following = table.some_of(seat.tenant, ask.after, ask.count)
        lease = seat.pool.lease(slots, seat.tenant, lease_s)
        keys, parents = b"".join(table.keys[slot] for slot in slots), b"".join(map(table.parent_key, slots))
        return messages.Browsed(following, keys, parents, [column[slots].tobytes() for column in table.places], lease)

    # --- writing ---------------------------------------------------------------------------------------------------

    async def _reserve(self, ask: messages.Reserve) -> messages.Answer:
        seat = self._seats.of(ask.seat)
        keys, parents = _keys(ask.keys), _keys(ask.parents)
        if not len(keys) == len(parents) == len(ask.lengths):
            raise ProtocolError("keys, parents and lengths are of as many pages")
        kind = _kind(seat, ask.kind)
        fixed = seat.pool.namespace.kinds[kind].payload_bytes
        for length in ask.lengths:
            if not 0 < length <= min(PAGE_BYTES_MAX, self.pools.config.capacity_bytes // 64):
                raise LimitExceeded(f"a page of {length} bytes: at most {PAGE_BYTES_MAX}, and 1/64 of the capacity")
            if fixed not in (0, length):
                raise LimitExceeded(f"a page of {length} bytes: this kind has pages of {fixed}")
        signer = self._signer() if ask.grant else None
        number, states, found = await seat.pool.reserve(
            seat.number, seat.tenant, kind, keys, parents, ask.lengths, seat.policy
        )
        if ask.durable and not number:
            await seat.pool.flush()  # It may have come a moment ago.
        places = [place for place in found if place is not None]
        blob, grant = b"".join(PLACE.pack(*place) for place in places), b""
        if signer is not None and places:
            grant = await self._grant_to_write(signer, seat, number, [place.segment for place in places])
        return messages.Reserved(number, bytes(states), blob, grant)

    async def _grant_to_write(self, signer: Granter, seat: Seat, number: int, segments: Sequence[int]) -> bytes:
        """For a reservation, which is given up where there is none to be had."""
        pool = seat.pool
        ends = pool.space.note_granted(segments)
        directory, tenant = f"{pool.directory}/segments", pool.index.tenants[seat.tenant]
        try:
            grant = await signer.to_write(directory, ends, tenant=tenant, reservation=number)
            pool.space.note_granted(segments)  # It may have taken a while.
            return grant
        except BaseException:
            pool.give_up(number, seat.number)
            raise

    async def _commit(self, ask: messages.Commit) -> messages.Answer:
        seat = self._seats.of(ask.seat)
        if len(ask.reservations) != len(ask.crcs):
            raise ProtocolError("each reservation has its checksums")
        tokens = ask.tokens or [b""] * len(ask.reservations)
        if len(tokens) != len(ask.reservations):
            raise ProtocolError("each reservation has its tokens, or none has any")
        gone = []
        for number, crcs, told in zip(ask.reservations, ask.crcs, tokens, strict=True):
            try:
                with self._telling(seat, number, told):
                    seat.pool.commit(number, seat.number, crcs)
            except NotFound:
                gone.append(number)
        if ask.durable:
            await seat.pool.flush()
        return messages.Committed(gone)

    def _telling(self, seat: Seat, number: int, tokens: bytes) -> contextlib.AbstractContextManager[None]:
        """Meanwhile who follows events is told the tokens of a reservation's pages."""
        keys = seat.pool.reserved(number, seat.number)
        if self._events is None or not tokens or not keys:
            return contextlib.nullcontext()
        return self._events.with_tokens(seat.pool, keys, tokens)

    def _give_up(self, ask: messages.GiveUp) -> messages.Answer:
        seat = self._seats.of(ask.seat)
        seat.pool.give_up(ask.reservation, seat.number)
        return messages.Okay()

    async def _flush(self, ask: messages.Flush) -> messages.Answer:
        await self._seats.of(ask.seat).pool.flush()
        return messages.Okay()

    async def _remove(self, ask: messages.Remove) -> messages.Answer:
        seat = self._seats.of(ask.seat)
        return messages.Okay(await seat.pool.remove(seat.tenant, _keys(ask.keys)))

    def _pin(self, ask: messages.Pin) -> messages.Answer:
        seat = self._seats.of(ask.seat)
        if not 0 <= ask.for_s <= PIN_S_MAX:
            raise LimitExceeded(f"pages are pinned for at most {PIN_S_MAX:g} s at a time: not {ask.for_s}")
        return messages.Okay(seat.pool.pin(seat.tenant, _keys(ask.keys), ask.for_s))

    # --- operating -------------------------------------------------------------------------------------------------

    def figures(self, only: str | None = None) -> Figures:
        """What there is and what was done; `only`: as far as it is one tenant's."""
        seen = {n: p for n, p in self.pools.opened.items() if only is None or p.index.tenant(only) is not None}
        found: Figures = {
            "address": self.pools.address,
            "namespaces": {n: stat_of(p, self._seats.policies(p), only) for n, p in seen.items()},
        }
        found |= {"store": self._store, "wall_s": self._runtime.wall_ns() / 1e9}
        if only is None:
            found |= {"seats": len(self._seats), "opening": self.pools.opening, "requests": requests_of(self.counts)}
        return found

    def _stat(self, ask: messages.Stat) -> messages.Answer:
        if not self._tenants.is_operator(ask.token):
            self._tenants.check(ask.tenant, ask.token)
        return _numbers(self.figures(None if self._tenants.is_operator(ask.token) else ask.tenant))

    async def _erase(self, ask: messages.Erase) -> messages.Answer:
        self._tenants.check(ask.tenant, ask.token)
        # To say that there was nothing would be wrong, and nobody would ask again.
        if missing := [name for name in await self.pools.elsewhere() if ask.namespace in ("", name)]:
            raise Unavailable(
                f"{', '.join(missing)} is not open here: ask the server that serves it, by its name, or again later"
            )
        report = {}
        for name, pool in list(self.pools.opened.items()):
            if ask.namespace not in ("", name):
                continue
            number = pool.index.tenant(ask.tenant)
            if number is None:
                await pool.ownership.check()  # It may have come since, to who has taken over.
                continue
            pages, size = await pool.erase(number)
            await pool.flush()
            report[name] = {"pages": pages, "bytes": size}
        return _numbers(report)

    async def _drop(self, ask: messages.Drop) -> messages.Answer:
        self._tenants.check_operator(ask.token)
        pool = self.pools.named(ask.namespace)
        report = {name: await pool.erase(number) for number, name in enumerate(pool.index.tenants)}
        await pool.flush()
        return _numbers({name: {"pages": pages, "bytes": size} for name, (pages, size) in report.items()})

    def _quota(self, ask: messages.Quota) -> messages.Answer:
        self._tenants.check_operator(ask.token)
        pool = self.pools.named(ask.namespace)
        pool.set_quota(pool.tenant(ask.tenant), ask.limit_bytes)
        return messages.Okay()

    def _ttl(self, ask: messages.Ttl) -> messages.Answer:
        self._tenants.check_operator(ask.token)
        if not 0 <= ask.ttl_s <= TTL_S_MAX:
            raise LimitExceeded(f"pages stay for at most {TTL_S_MAX:g} s: not {ask.ttl_s}")
        pool = self.pools.named(ask.namespace)
        pool.set_ttl(pool.tenant(ask.tenant) if ask.tenant else None, ask.ttl_s)
        return messages.Okay()

    async def _collect(self, ask: messages.Collect) -> messages.Answer:
        self._tenants.check_operator(ask.token)
        pool = self.pools.named(ask.namespace)
        await pool.keep_up()
        return _numbers(asdict(pool.space.counts))


_HANDLERS: dict[type, Callable[[KvService, Any], messages.Answer | Awaitable[messages.Answer]]] = {
    messages.Open: KvService._open,
    messages.Match: KvService._match,
    messages.Lookup: KvService._lookup,
    messages.Reserve: KvService._reserve,
    messages.Commit: KvService._commit,
    messages.GiveUp: KvService._give_up,
    messages.Release: KvService._release,
    messages.Extend: KvService._extend,
    messages.Renew: KvService._renew,
    messages.Report: KvService._report,
    messages.Remove: KvService._remove,
    messages.Pin: KvService._pin,
    messages.Close: KvService._close,
    messages.Flush: KvService._flush,
    messages.Stat: KvService._stat,
    messages.Erase: KvService._erase,
    messages.Drop: KvService._drop,
    messages.Quota: KvService._quota,
    messages.Collect: KvService._collect,
    messages.Browse: KvService._browse,
    messages.Ttl: KvService._ttl,
}


def _keys(blob: bytes) -> list[bytes]:
    _check_keys(blob)
    return split(blob, KEY_BYTES)


def _check_keys(blob: bytes) -> None:
    if len(blob) % KEY_BYTES or len(blob) > KEYS_MAX * KEY_BYTES:
        raise ProtocolError(f"keys are {KEY_BYTES} bytes each, at most {KEYS_MAX} of them: not {len(blob)} bytes")


def _seconds(value: float, limit: float) -> float:
    if not value >= 0:  # No number is not either.
        raise ProtocolError(f"{value} seconds")
    return min(value, limit)


def _kind(seat: Seat, kind: int) -> int:
    if not 0 <= kind < len(seat.pool.namespace.kinds):
        raise ProtocolError(f"no kind {kind} in this namespace")
    return kind


def _numbers(report: dict[str, Any]) -> messages.Numbers:
    return messages.Numbers(json.dumps(report))
