"""Reads and writes that are begun now and waited for later, as 3FS's USRBIO has them: for a blocking program.

    with client.io_queue(depth=64) as queue:
        for offset in range(0, size, 4096):
            queue.submit_read("/file", offset, memory[offset : offset + 4096])
        for token, nbytes, error in queue.wait(n=queue.open): ...

A read goes out as soon as it is submitted, if nothing small is on its way; small ones that are submitted meanwhile go
together, when what is on its way is there or somebody waits. One message and one answer for many is what makes small
reads quick.

Invariants:
  - A buffer is held from `submit` to the completion, and nothing touches it afterwards.
  - Each token is returned by `wait` once, in the order in which they end. `close` returns when nothing is under way.
  - At most `depth` are submitted and not returned yet.
  - Of a child that is forked nothing here is used: the parent goes on as if it was not.

Does not know: chunks. An `AsyncClient` has none of these: `asyncio.gather` does the same with its calls.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import LimitExceeded, StoreClosed
from ..types import BATCH_ITEMS_MAX
from .batch import batch_read, batch_write, open_files
from .buffers import flat_view, writable_view
from .core import check_range

if TYPE_CHECKING:
    from ..stores import Store
    from .core import Core
    from .handle import File

TOGETHER_BYTES_MAX = 64 << 10
"""A read of more goes by itself: others would wait for its bytes."""
TOGETHER_ITEMS_MAX = 256


class Completion(NamedTuple):
    """How a read or a write ended."""

    token: int
    nbytes: int
    """Bytes read (fewer at the end of the file), or written. 0 if there was an error."""
    error: Exception | None


class _Submitted(NamedTuple):
    token: int
    file: str | File
    offset: int
    view: memoryview


class IoQueue:
    """See `Client.io_queue`. Safe to use from several threads: a completion goes to whoever waits first."""

    def __init__(self, store: Store, core: Core, depth: int) -> None:
        if not 1 <= depth <= BATCH_ITEMS_MAX:
            raise LimitExceeded(f"the depth of a queue is from 1 to {BATCH_ITEMS_MAX}, not {depth}")
        self.depth = depth
        self.open = 0
        """Submitted and not returned by `wait` yet."""
        self._store = store
        self._core = core
        self._is_closed = False
        self._count = 0
        self._changed = threading.Condition(threading.Lock())
        """Guards what is here. The baton is never taken under it."""
        self._together: list[_Submitted] = []
        """Small reads that have not gone out."""
        self._small_calls = 0
        """Calls of small reads that are on their way."""
        self._under_way = 0
        self._done: list[Completion] = []

    def submit_read(self, file: str | File, offset: int, buffer: Any) -> int:
        """Begin to fill `buffer` from `offset` of a file; returns the token of its completion.

        Raises LimitExceeded (`depth` are open: `wait` first), StoreClosed. What else goes wrong is in the completion.
        """
        view = writable_view(buffer)
        check_range(offset, len(view))
        read = self._take(file, offset, view)
        if len(view) > TOGETHER_BYTES_MAX:
            self._begin([read], self._read([read]))
            return read.token
        with self._changed:
            self._together.append(read)
        self._send_small(only_if_idle=True)
        return read.token

    def submit_write(self, file: str | File, offset: int, data: Any) -> int:
        """Begin to write `data` at `offset` of a file, which must exist or is made; durable when it completes.

        `data` must not change before. Writes that overlap may happen in either order. Raises as `submit_read`.
        """
        view = flat_view(data)
        check_range(offset, len(view))
        write = self._take(file, offset, view)
        self._begin([write], self._write(write))
        return write.token

    def wait(self, n: int = 1, timeout_s: float | None = None) -> list[Completion]:
        """At least `n` completions and all that there are; fewer, perhaps none, once `timeout_s` is over.

        Raises LimitExceeded if fewer than `n` are open, StoreClosed.
        """
        self._check()
        self._send_small()
        with self._changed:
            if n > self.open:
                raise LimitExceeded(f"{n} completions of {self.open} that are open")
            self._changed.wait_for(lambda: len(self._done) >= n, timeout_s)
            done, self._done = self._done, []
            self.open -= len(done)
        return done

    def close(self) -> None:
        """Return when nothing is under way, however often interrupted; what nobody waited for is dropped."""
        if self._store.forked:
            self._is_closed = True
            return
        with self._changed:
            self._is_closed = True
        self._send_small()
        interrupt: BaseException | None = None
        with self._changed:
            while self._under_way:
                try:
                    self._changed.wait()
                except BaseException as error:
                    interrupt = error
            self._done.clear()
            self.open = 0
        if interrupt is not None:
            raise interrupt

    def __enter__(self) -> IoQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):  # type: ignore[no-untyped-def]
        self.close()

    # ---- on their way

    def _check(self) -> None:
        if self._store.forked:
            raise StoreClosed("the queue was made before this process forked; make another one")
        if self._is_closed:
            raise StoreClosed("the queue is closed")

    def _take(self, file: str | File, offset: int, view: memoryview) -> _Submitted:
        self._check()
        for each in open_files([(file, offset, len(view))], self._store):
            each.flush()
        with self._changed:
            if self.open >= self.depth:
                raise LimitExceeded(f"{self.open} reads and writes are open: wait for some")
            self.open += 1
            self._under_way += 1
            self._count += 1
            return _Submitted(self._count, file, offset, view)

    def _send_small(self, *, only_if_idle: bool = False) -> None:
        while reads := self._next_small(only_if_idle=only_if_idle):
            self._begin(reads, self._read(reads), is_small=True)

    def _next_small(self, *, only_if_idle: bool) -> list[_Submitted]:
        with self._changed:
            if only_if_idle and self._small_calls and len(self._together) < TOGETHER_ITEMS_MAX:
                return []
            reads, self._together = self._together[:TOGETHER_ITEMS_MAX], self._together[TOGETHER_ITEMS_MAX:]
            self._small_calls += bool(reads)
            return reads

    def _begin(
        self, submitted: Sequence[_Submitted], call: Coroutine[Any, Any, list[Any]], *, is_small: bool = False
    ) -> None:
        self._store.portal.begin(call, functools.partial(self._ended, submitted, is_small))

    def _ended(
        self, submitted: Sequence[_Submitted], is_small: bool, results: list[Any] | None, error: Exception | None
    ) -> None:
        """In the loop's thread, or in that of whoever submitted it."""
        if results is None:
            results = [error] * len(submitted)
        with self._changed:
            for each, result in zip(submitted, results, strict=True):
                failed = isinstance(result, Exception)
                self._done.append(Completion(each.token, 0 if failed else result, result if failed else None))
            self._under_way -= len(submitted)
            self._small_calls -= is_small
            self._changed.notify_all()
        self._send_small(only_if_idle=True)

    async def _read(self, reads: Sequence[_Submitted]) -> list[Any]:
        items = [(each.file, each.offset, len(each.view)) for each in reads]
        return await batch_read(self._core, items, [each.view for each in reads], raise_errors=False)

    async def _write(self, write: _Submitted) -> list[Any]:
        await batch_write(self._core, [(write.file, write.offset, write.view)])
        return [len(write.view)]
