"""Metadata requests to whichever metadata server answers, so that the loss of one is a pause and not an error.

A `MetaRouter` is a `Connection`. It stays with one server as long as that answers, and goes on to the next when it does
not. A request that changes something goes as `Once`, under a number of our session that stays the same from attempt to
attempt: whoever gets it twice does it once.

Errors at the deadline: UpdateUnknown if an update was ever sent without an answer, else Unavailable. When our session
has ended a request goes on under a new one, unless an attempt of it may have happened: then UpdateUnknown.

Does not know: what the requests mean.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DeadlineExceeded, LimitExceeded, SessionExpired, StoreClosed, Unavailable, UpdateUnknown
from ..messages import Message, Once
from ..runtime import Runtime
from ..transport.codec import encode_message
from ..transport.types import Network
from .routes import Routes


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaRouterConfig:
    """How hard a client tries."""

    deadline_s: float = 30.0
    """A request that could not be done by then ends with an error."""
    retry_first_s: float = 0.02
    """Pause after all servers were tried in vain, unless newer routing comes sooner; doubled up to `retry_max_s`."""
    retry_max_s: float = 0.5

    def __post_init__(self) -> None:
        if min(self.deadline_s, self.retry_first_s, self.retry_max_s) <= 0:
            raise LimitExceeded("deadlines and pauses must be more than 0")


class _Numbers:
    """The numbers of one session's requests."""

    def __init__(self, client: bytes) -> None:
        self.client = client
        self._next = 1
        self._open: dict[int, None] = {}
        """In order, since numbers only grow."""

    def take(self) -> int:
        number = self._next
        self._next += 1
        self._open[number] = None
        return number

    def done(self, number: int) -> None:
        """It is not sent again."""
        del self._open[number]

    @property
    def done_below(self) -> int:
        return next(iter(self._open), self._next)


class _Attempts:
    """The attempts of one request: where the next one goes, and when there are no more."""

    def __init__(self, router: MetaRouter) -> None:
        self._router = router
        self._deadline_s = router.runtime.now_s() + router.config.deadline_s
        self._pause_s = router.config.retry_first_s
        self._failed: set[str] = set()
        """Servers that were tried since the last pause."""
        self.is_unknown = False
        """An attempt was sent and its outcome is not known."""
        self.count = 0

    async def after(self, server: str, error: Exception) -> None:
        """Go on to the next server, or wait if all have been tried. Raises when the time is over."""
        router = self._router
        version = router.routes.routing.version
        left_s = self._deadline_s - router.runtime.now_s()
        if left_s <= 0:
            what = f"not done after {router.config.deadline_s:g} s; the last answer was: {error}"
            raise (UpdateUnknown(what) if self.is_unknown else Unavailable(what)) from error
        self._failed.add(server)
        router.leave(server)
        if self._failed.issuperset(router.routes.metas):
            self._failed.clear()
            await router.routes.news(version, min(self._pause_s, left_s))
            self._pause_s = min(2 * self._pause_s, router.config.retry_max_s)


class MetaRouter:
    """The way to the metadata. Give it as the connection of a `Core`."""

    def __init__(
        self, runtime: Runtime, network: Network, routes: Routes, *, config: MetaRouterConfig | None = None
    ) -> None:
        self.runtime = runtime
        self.routes = routes
        self.config = config or MetaRouterConfig()
        self._network = network
        self._server = ""
        self._numbers = _Numbers(b"")

    def call(self, request: Message, buffers: Sequence[memoryview] = ()) -> Coroutine[Any, Any, Message]:
        """Serve one metadata request. Raises what the service raises, Unavailable, UpdateUnknown."""
        return self._ask(request) if request.changes_nothing else self._change(request)

    def leave(self, server: str) -> None:
        """It did not answer: the next one in the list is asked from now on."""
        metas = self.routes.metas
        if server == self._server and server in metas:
            self._server = metas[(metas.index(server) + 1) % len(metas)]

    async def _ask(self, request: Message) -> Message:
        attempts = _Attempts(self)
        while True:
            server = self._choose()
            try:
                return await self._send(server, request)
            except (Unavailable, UpdateUnknown, DeadlineExceeded, StoreClosed) as error:
                await attempts.after(server, error)

    async def _change(self, request: Message) -> Message:
        attempts = _Attempts(self)
        body = encode_message(request)
        while True:
            numbers = self._session()
            number = numbers.take()
            try:
                return await self._change_as(numbers, number, body, attempts)
            except SessionExpired as error:
                if attempts.is_unknown:
                    raise UpdateUnknown(
                        "the session ended while a request was in the air: it may or may not have happened"
                    ) from error
                await self.routes.renew(numbers.client)
                await attempts.after(self._server, error)
            finally:
                numbers.done(number)

    async def _change_as(self, numbers: _Numbers, number: int, body: bytes, attempts: _Attempts) -> Message:
        """Try until it is done. Raises SessionExpired when there is another session."""
        while True:
            server = self._choose()
            try:
                attempts.count += 1
                once = Once(numbers.client, number, numbers.done_below, body, attempts.count)
                return await self._send(server, once)
            except (UpdateUnknown, StoreClosed) as error:
                attempts.is_unknown = True
                await attempts.after(server, error)
            except Unavailable as error:
                await attempts.after(server, error)
            if self.routes.client != numbers.client:
                raise SessionExpired("the session has ended")

    def _session(self) -> _Numbers:
        if self._numbers.client != self.routes.client:
            self._numbers = _Numbers(self.routes.client)
        return self._numbers

    def _choose(self) -> str:
        """The server to ask: the one of before, or at first any, so that clients spread over them."""
        metas = self.routes.metas
        if self._server not in metas:
            self._server = metas[self.runtime.random_bytes(1)[0] % len(metas)] if metas else ""
        return self._server

    async def _send(self, server: str, request: Message) -> Message:
        if not server:
            raise Unavailable("the cluster has no metadata server now")
        return await self._network.connection(server).call(request)
