"""The way to a store that a server owns: what clients of this process have in place of services of their own.

One task keeps this process attached. When the connection is lost it finds the owner again, which may mean to start the
next server, and says who we are; then the calls that were in the air are sent again. Names and chunks are changed under
a number, or a name, that stays the same from attempt to attempt, so nothing happens twice.

Errors, when nobody can be reached: for an update that was sent, UpdateUnknown; else what is wrong with the owner:
DeadlineExceeded (it does not answer: stopped), StoreBusy, or what opening the store raised. Calls that come after the
first attempt has failed are told at once, until one succeeds.

Does not know: what requests mean.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..client.channels import Channels
from ..errors import DeadlineExceeded, EmberError, SessionExpired, StoreClosed, Unavailable, UpdateUnknown
from ..messages import (
    Attach,
    Attached,
    Attend,
    Detach,
    Maintain,
    Maintained,
    Message,
    Once,
    RemoveChunks,
    TruncateChunk,
    WriteChunks,
)
from ..runtime import AsyncioRuntime
from ..transport import TcpConfig, TcpNetwork
from ..transport.codec import encode_message
from .finding import find_owner
from .socket_place import SocketPlace

SILENT_S = 3.0
"""An owner that lets nobody in for so long is stopped, or as good as that."""
RETRY_FIRST_S, RETRY_MAX_S = 0.02, 0.5
RETRY_S = 30.0
"""A request that a server which is there does not take is sent again for so long."""
DETACH_S = 1.0

_LOST = (Unavailable, UpdateUnknown, DeadlineExceeded, StoreClosed)
"""After these a request is sent again."""


class _Client:
    """Who we are for the server, and the names of our requests to the metadata."""

    def __init__(self, client: bytes) -> None:
        self.client = client
        self._next = 1
        self._open: dict[int, None] = {}

    def take_number(self) -> int:
        """For a request."""
        number = self._next
        self._next += 1
        self._open[number] = None
        return number

    def end_number(self, number: int) -> None:
        """It is not sent again."""
        del self._open[number]

    @property
    def done_below(self) -> int:
        """Numbers below are not sent again."""
        return next(iter(self._open), self._next)


class AttachedConnection:
    """A `Service` that is elsewhere. `open` or `start`, later `close`."""

    def __init__(self, runtime: AsyncioRuntime, directory: Path, settings: str, *, client: bytes) -> None:
        """`settings`: those of a store that has to be opened anew. `client`: who we are at first."""
        self._runtime = runtime
        self._directory = directory
        self._settings = settings
        self._place = SocketPlace(directory)
        self.network = TcpNetwork(runtime, TcpConfig())
        self.address = f"unix:{self._place.path}"
        """Of whoever serves the store."""
        self._connection = self.network.connection(self.address)
        self._client = _Client(client)
        self._channels = Channels()
        self._is_new = False
        """No server knows us yet."""
        self._pid = 0
        self._is_up = False
        self._is_closed = False
        self._outcome: asyncio.Future[EmberError | OSError | None] = runtime.future()
        """Of the attempt to reach an owner that is under way."""
        self._trouble: EmberError | OSError | None = None
        """Of the attempt before: as long as it lasts nobody waits for the next one."""
        self._keeping: asyncio.Task[None] | None = None

    @property
    def client(self) -> bytes:
        """Who we are."""
        return self._client.client

    async def open(self, pid: int) -> None:
        """Attach to the server `pid`. Raises Unavailable if it has gone, DeadlineExceeded if it does not answer."""
        started_s = self._runtime.now_s()
        self._pid = pid
        try:
            await self._attach(again=False)
        except Unavailable as error:
            if self._runtime.now_s() - started_s < SILENT_S / 2:
                raise
            raise self._silent() from error
        self._is_up = True
        self.start()

    def start(self) -> None:
        """Keep attached from now on; calls wait until we are."""
        self._keeping = self._runtime.spawn(self._keep(), "sharing-keep")

    async def close(self) -> None:
        """End this client: what it has open at the server is closed."""
        self._is_closed = True
        await self._runtime.sleep(0)  # Goes on in the loop's thread.
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        if self._is_up:
            detaching = self._runtime.spawn(self._detach(), "sharing-detach")
            await asyncio.wait([detaching], timeout=DETACH_S)
            detaching.cancel()
        await self.network.close()
        self._place.close()

    def forget_after_fork(self) -> None:
        """In the child: the server must see when the parent ends."""
        self.network.forget_after_fork()

    # --- requests --------------------------------------------------------------------------------------------------

    def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Awaitable[Message]:
        """Serve one request. Raises what the server raises; see above."""
        if request.changes_nothing:
            return self._send(lambda _: request, buffers)
        if isinstance(request, WriteChunks | TruncateChunk | RemoveChunks):
            return self._update(request, buffers)
        return self._change(request)

    async def _update(
        self, request: WriteChunks | TruncateChunk | RemoveChunks, buffers: Sequence[memoryview]
    ) -> Message:
        bound = request.client if isinstance(request, WriteChunks) else b""
        channel, sequence = self._channels.take()

        def named(client: _Client) -> Message:
            if bound and bound != client.client:
                # What it is part of was closed: somebody else may write there by now.
                raise SessionExpired("this process was given up: what it had open is closed")
            return msgspec.structs.replace(request, client=client.client, channel=channel, sequence=sequence)

        try:
            return await self._send(named, buffers, changes=True)
        finally:
            self._channels.end(channel)

    async def _change(self, request: Message) -> Message:
        body = encode_message(request)
        numbers: dict[_Client, int] = {}

        def numbered(client: _Client) -> Message:
            if client not in numbers:
                numbers[client] = client.take_number()
            return Once(client.client, numbers[client], client.done_below, body)

        try:
            return await self._send(numbered, (), changes=True)
        finally:
            for client, number in numbers.items():
                client.end_number(number)

    async def _send(
        self, make: Callable[[_Client], Message], buffers: Sequence[memoryview], *, changes: bool = False
    ) -> Message:
        """Send what `make` makes for who we are until it is answered."""
        is_unknown = False
        client = self._client
        pause_s = RETRY_FIRST_S
        deadline_s: float | None = None
        while True:
            if not self._is_up:
                await self._restored(is_sent=is_unknown, changes=changes)
            if client is not self._client:
                if is_unknown:
                    raise UpdateUnknown("this process was given up while a request was in the air")
                client = self._client
            try:
                return await self._connection.call(make(client), buffers)
            except SessionExpired:
                if self._is_up and client is self._client:
                    raise
            except _LOST as error:
                is_unknown = is_unknown or (changes and not isinstance(error, Unavailable))
                now_s = self._runtime.now_s()
                deadline_s = deadline_s or now_s + RETRY_S
                if self._is_closed or now_s >= deadline_s:
                    raise UpdateUnknown(str(error)) if is_unknown else error from error
            await self._runtime.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _restored(self, *, is_sent: bool, changes: bool) -> None:
        """Return when we are attached again. Raises when the attempt that is under way fails."""
        error = self._trouble or await asyncio.shield(self._outcome)
        if error is None:
            return
        if is_sent:
            raise UpdateUnknown(f"it may or may not have happened: {error}") from error
        if changes and isinstance(error, DeadlineExceeded):
            raise Unavailable(str(error)) from error
        raise error

    async def maintain(self, what: str, arguments: dict[str, Any]) -> str:
        """Upkeep, done by the server; the result as JSON."""
        if not self._is_up:
            await self._restored(is_sent=False, changes=True)
        reply = await self._connection.call(Maintain(what, json.dumps(arguments)))
        assert isinstance(reply, Maintained)
        return reply.result

    async def dump(self) -> Path:
        """A new file with a dump of the metadata; the caller's to remove."""
        name: str = json.loads(await self.maintain("dump", {}))
        return self._directory / name

    # --- being attached --------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            if self._is_up:
                try:
                    await self._connection.call(Attend(self.client))
                except EmberError:
                    pass  # However it ended: we are not attached any more.
                self._is_up = False
                self._outcome = self._runtime.future()
            self._trouble = error = await self._reach()
            self._is_up = error is None
            outcome = self._outcome
            if error is not None:
                self._outcome = self._runtime.future()
            outcome.set_result(error)
            if error is not None:
                await self._runtime.sleep(RETRY_MAX_S)

    async def _reach(self) -> EmberError | OSError | None:
        """Attach to whoever owns the store; the error if that cannot be done."""
        started_s: float | None = None
        while True:
            try:
                find = functools.partial(
                    find_owner, self._directory, self._settings, may_own=False, is_over=lambda: self._is_closed
                )
                owner = await self._runtime.offload(find)
                assert isinstance(owner, int)
                if started_s is None or owner != self._pid:
                    self._pid, started_s = owner, self._runtime.now_s()
                await self._attach(again=not self._is_new)
            except SessionExpired:
                self._is_new = True
                self._client = _Client(self._runtime.random_bytes(16))
            except (Unavailable, UpdateUnknown):
                if started_s is not None and self._runtime.now_s() - started_s >= SILENT_S:
                    return self._silent()
                await self._runtime.sleep(RETRY_FIRST_S)
            except (EmberError, OSError) as error:
                return error
            else:
                return None

    async def _attach(self, *, again: bool) -> None:
        description = f"{Path(sys.argv[0]).name or 'python'} {os.getpid()}"
        try:
            reply = await self._connection.call(Attach(self.client, again, description))
        except UpdateUnknown as error:
            raise Unavailable(str(error)) from error  # To come twice is to come.
        assert isinstance(reply, Attached)
        self._pid, self._settings = reply.pid, reply.settings
        self._is_new = False

    async def _detach(self) -> None:
        try:
            await self._connection.call(Detach(self.client))
        except EmberError:
            pass  # It will find out.

    def _silent(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"process {self._pid} serves this store and does not answer: is it stopped? Continue or end it",
            str(self._directory),
        )
