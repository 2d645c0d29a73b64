"""Puts of a client: places are reserved at the service, pages copied to the writer, committed once they are written.

Does not know: how pages are written, or how requests reach the service.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from emberfs import NotFound
from emberfs.client.buffers import flat_view
from emberfs.errors import DeadlineExceeded, EmberError, GrantExpired

from . import messages
from .caller import Caller
from .errors import SeatGone
from .keys import ROOT
from .page import HEADER_BYTES, places_of
from .puts import STATES, STORED
from .writing import SLAB_BYTES, Copied, PageWriter, Part, Ticket

PUT_PAGES_MAX = 1024
PUT_BYTES_MAX = SLAB_BYTES
"""In one request: so many pages, or so many bytes, or one page that is larger."""
Commit = Callable[[Sequence[Copied]], None]


class Putter:
    """Safe to use from many threads. `make_writer` is called at the first put, with what is to commit."""

    def __init__(self, caller: Caller, make_writer: Callable[[Commit], PageWriter], *, grants: bool = False) -> None:
        """`grants`: pages are written under grants."""
        self._caller, self._make_writer, self._grants = caller, make_writer, grants
        self._writer: PageWriter | None = None
        self._putting = threading.Lock()
        """Pages of one writer follow each other."""

    def put(
        self, kind: int, keys: Sequence[bytes], payloads: Sequence[Any], *, parent: bytes | None, durable: bool,
        chained: bool, tokens: Sequence[bytes],
    ) -> list[str]:  # fmt: skip
        """What became of each page, see `KVCache.put`; `tokens`: of each page, or none."""
        views = [flat_view(payload) for payload in payloads]
        parents = [parent or ROOT, *keys[:-1]] if chained else [ROOT] * len(keys)
        states: list[str] = []
        for part in _parts(views):
            given = kind, keys[part], parents[part], views[part], durable, tokens[part]
            try:
                states += self._put(*given)
            except (NotFound, SeatGone, GrantExpired):  # Service or segment are other ones by now, or we were slow.
                states += self._put(*given)
        return states

    def flush(self) -> None:
        """What was put before is committed when this returns. Raises what befell it, if it is not."""
        if self._writer is not None:
            self._writer.flush(self._caller.timeout_s)
        self._caller.ask(messages.Flush, messages.Okay)

    def close(self) -> None:
        """Write what was put, as far as the time goes."""
        if self._writer is not None:
            self._writer.close(self._caller.timeout_s)

    def _put(
        self, kind: int, keys: Sequence[bytes], parents: Sequence[bytes], views: Sequence[memoryview], durable: bool,
        tokens: Sequence[bytes],
    ) -> list[str]:  # fmt: skip
        blob, above, lengths = b"".join(keys), b"".join(parents), [len(view) for view in views]
        caller = self._caller
        if not self._putting.acquire(timeout=caller.timeout_s):
            raise DeadlineExceeded(f"other threads' puts took more than {caller.timeout_s:g} s")
        try:
            answer = caller.ask(
                lambda seat: messages.Reserve(seat, kind, blob, above, lengths, durable, self._grants),
                messages.Reserved,
            )
            ticket = self._add(answer, kind, keys, parents, views, durable, tokens)
        finally:
            self._putting.release()
        if durable and ticket is not None:
            try:
                ticket.wait(caller.timeout_s)
            except GrantExpired:  # Nothing of it was written, nor will be.
                self._give_up(caller.seated().seat, answer.reservation)
                raise
        return [STATES[state] for state in answer.states]

    def _add(
        self, answer: messages.Reserved, kind: int, keys: Sequence[bytes], parents: Sequence[bytes],
        views: Sequence[memoryview], durable: bool, tokens: Sequence[bytes],
    ) -> Ticket | None:  # fmt: skip
        """Have the pages written that the service wants. None: there are none."""
        wanted = [index for index, state in enumerate(answer.states) if state == STORED]
        if not wanted:
            return None
        seat = self._caller.seated()

        def pick(column: Sequence[Any]) -> list[Any]:
            return [column[index] for index in wanted]

        part = Part(
            reservation=answer.reservation, seat=seat.seat, keys=pick(keys), parents=pick(parents),
            places=places_of(answer.places), payloads=pick(views), kind=kind, tenant=seat.number, is_durable=durable,
            tokens=b"".join(pick(tokens)) if tokens and seat.wants_tokens else b"", grant=answer.grant,
        )  # fmt: skip
        try:
            if self._writer is None:
                self._writer = self._make_writer(self._commit)
            return self._writer.add(part, timeout_s=self._caller.timeout_s)
        except BaseException:
            self._give_up(seat.seat, answer.reservation)
            raise

    def _give_up(self, seat: int, reservation: int) -> None:
        with contextlib.suppress(EmberError):
            self._caller.call(messages.GiveUp(seat, reservation), messages.Okay)

    def _commit(self, parts: Sequence[Copied]) -> None:
        """Called by the writer's threads."""
        for seat in dict.fromkeys(part.seat for part in parts):
            mine = [part for part in parts if part.seat == seat]
            is_durable = any(part.is_durable for part in mine)
            numbers, crcs = [part.reservation for part in mine], [part.crcs for part in mine]
            tokens = [part.tokens for part in mine]
            ask = messages.Commit(seat, numbers, crcs, is_durable, tokens if any(tokens) else [])
            try:
                done = self._caller.call(ask, messages.Committed)
            except (EmberError, OSError) as error:
                for part in mine:
                    part.ticket.settle(error)
                continue
            for part in mine:
                is_gone = part.reservation in done.gone
                part.ticket.settle(NotFound("pages came too late: put them again") if is_gone else None)


def _parts(views: Sequence[memoryview]) -> Iterator[slice]:
    """Slices of pages that go in one request each."""
    begin, size = 0, 0
    for index, view in enumerate(views):
        size += HEADER_BYTES + len(view)
        if index > begin and (size > PUT_BYTES_MAX or index - begin == PUT_PAGES_MAX):
            yield slice(begin, index)
            begin, size = index, HEADER_BYTES + len(view)
    if begin < len(views):
        yield slice(begin, len(views))
