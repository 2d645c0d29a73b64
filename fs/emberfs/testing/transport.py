"""The conformance suites of the transport seam: a way to a service, and a network of them.

    class TestMyConnection(ConnectionConformance):
        @pytest.fixture
        def connect(self, runtime): ...     # an async function: service -> a connection to it

    class TestMyNetwork(NetworkConformance):
        @pytest.fixture
        def make_network(self, runtime): ...    # a function that makes a network of its own for each side
        @pytest.fixture
        def address(self): ...                  # where to listen: "127.0.0.1:0", say

Two more fixtures are needed, in the class or around it: `runtime`, a `Runtime`, and `run`, a function that runs a
coroutine of that runtime to its end (`Portal(runtime).run`, or the simulator's).

Does not know: sockets.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import inspect
import types
import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, Literal

import msgspec
import pytest
from msgspec.structs import replace

from .. import errors
from ..errors import (
    Corruption,
    EmberError,
    NotFound,
    StoreBusy,
    StoreClosed,
    Unanswered,
    Unavailable,
    Unreachable,
    UpdateUnknown,
)
from ..messages import ChunksRead, Done, Heartbeat, Message, ReadChunks, Stat, Usage, WriteChunks
from ..routing import Role
from ..runtime import Runtime
from ..transport import Connection, Network, Service
from ..transport.codec import message_classes

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Connect = Callable[[Service], Awaitable[Connection]]


def driven(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a test that pytest can call of an async one, run by the fixture `run`."""

    @functools.wraps(test)
    def driven_test(self: object, run: Run, **fixtures: Any) -> None:
        run(test(self, **fixtures))

    signature = inspect.signature(test)
    own, *others = signature.parameters.values()
    added = inspect.Parameter("run", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    driven_test.__signature__ = signature.replace(parameters=[own, added, *others])  # type: ignore[attr-defined]
    return driven_test


# ---- services


class Echo:
    """Answers with the request itself, and remembers what came with it."""

    def __init__(self) -> None:
        self.payloads: list[list[bytes]] = []

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        self.payloads.append([bytes(buffer) for buffer in buffers])
        return request


class Raising:
    """Answers with an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error or EmberError("why")

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        raise self.error


class Filling:
    """Fills each buffer as far as the offset of its item says, with bytes that tell the item."""

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        assert isinstance(request, ReadChunks)
        counts = [min(count, len(buffer)) for count, buffer in zip(request.offsets, buffers, strict=True)]
        for index, (count, buffer) in enumerate(zip(counts, buffers, strict=True)):
            buffer[:count] = pattern(count, index)
        return ChunksRead(counts)


class Gated:
    """Holds every call but `Usage` until the test opens the gate, then fills whatever buffers there are."""

    def __init__(self, runtime: Runtime) -> None:
        self._gate = runtime.future()
        self._runtime = runtime
        self.began = 0
        self.ended = 0

    def open(self) -> None:
        if not self._gate.done():
            self._gate.set_result(None)

    async def until_began(self, count: int) -> None:
        while self.began < count:
            await self._runtime.sleep(1e-3)

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        if isinstance(request, Usage):
            return Done()
        self.began += 1
        await asyncio.shield(self._gate)
        self.ended += 1
        if isinstance(request, ReadChunks):
            for buffer in buffers:
                buffer[:] = b"\xff" * len(buffer)
            return ChunksRead([len(buffer) for buffer in buffers])
        return Done()


# ---- samples


def pattern(size: int, seed: int) -> bytes:
    """`size` bytes that differ from those of another seed at every place."""
    return (bytes(range(seed % 250, 250)) + bytes(range(seed % 250))) * (size // 250) + bytes([seed % 250]) * (
        size % 250
    )


def read_request(counts: Sequence[int]) -> ReadChunks:
    """What `Filling` fills `counts` bytes of its buffers for."""
    return ReadChunks([1] * len(counts), [b"c" * 16] * len(counts), list(counts))


def write_request(count: int) -> WriteChunks:
    return WriteChunks(b"client", 1, 1, [1] * count, [b"c" * 16] * count, [0] * count, 1 << 20)


def sample(kind: Any) -> Any:
    """Some value of a type that messages are made of; never the default of a field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    plain = {int: 300, str: "ä/b", bytes: b"\x00\xff", bool: True, float: 1.5}
    if kind in plain:
        return plain[kind]
    if origin is list:
        return [sample(args[0])] * 2
    if origin is tuple:
        return (sample(args[0]),) * 2 if args[-1] is Ellipsis else tuple(map(sample, args))
    if origin is dict:
        return {sample(args[0]): sample(args[1])}
    if origin is Literal:
        return args[-1]
    if origin in (typing.Union, types.UnionType):
        return sample(args[0])
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return list(kind)[-1]
    assert issubclass(kind, msgspec.Struct), kind
    return kind(*[sample(field.type) for field in _fields(kind)])


def _fields(kind: type[msgspec.Struct]) -> Iterator[Any]:
    hints = typing.get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        yield types.SimpleNamespace(type=hints[field.name])


def raised_errors() -> list[Exception]:
    """One of each class of `errors`, and what else a service raises."""
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, EmberError)]
    plain = [each("why") for each in classes if not each.__name__.startswith("_")]
    special = [
        NotFound("no such file", "/a"),
        Corruption("bad", "/a", chunk="1.2", offset=7),
        StoreBusy("taken", pid=7),
        ValueError("a bad value"),
        OSError(28, "No space left on device"),
    ]
    return [*plain, *special]


async def outcome(call: Awaitable[Message]) -> Message | Exception:
    try:
        return await call
    except Exception as error:
        return error


# ---- the suites


class ConnectionConformance:
    """What `types.Connection` promises."""

    @driven
    async def test_every_message_arrives_as_it_was_sent(self, connect: Connect) -> None:
        connection = await connect(Echo())
        for kind in message_classes():
            message = sample(kind)
            if isinstance(message, Heartbeat):  # With TLS a node speaks only as its certificate says.
                node = replace(message.node, name="127.0.0.1", role=Role.STORAGE)
                message = replace(message, node=node)
            assert await connection.call(message) == message

    @driven
    async def test_an_error_arrives_as_it_was_raised(self, connect: Connect) -> None:
        service = Raising()
        connection = await connect(service)
        for error in raised_errors():
            service.error = error
            got = await outcome(connection.call(Usage()))
            # Who passes this one on was reached.
            assert type(got) in (type(error), Unavailable if isinstance(error, Unreachable) else type(error))
            assert str(got) == str(error)
            for name in ("errno", "filename", "path", "chunk", "offset"):
                assert getattr(got, name, None) == getattr(error, name, None)

    @driven
    async def test_payloads_arrive_one_by_one(self, connect: Connect) -> None:
        echo = Echo()
        sent = [pattern(size, seed) for seed, size in enumerate([0, 1, 5000, 0, 3 << 20, 40_000, 70_000, 0])]
        await (await connect(echo)).call(write_request(len(sent)), [memoryview(each) for each in sent])
        assert echo.payloads == [sent]

    @driven
    async def test_a_read_fills_as_much_of_each_buffer_as_it_says(self, connect: Connect) -> None:
        sizes = [0, 1, 5000, 3 << 20, 40_000, 70_000, 100]
        counts = [0, 1, 4999, 3 << 20, 0, 65_536, 100]
        buffers = [bytearray(size) for size in sizes]
        reply = await (await connect(Filling())).call(read_request(counts), [memoryview(each) for each in buffers])
        assert reply == ChunksRead(counts)
        for seed, (buffer, count) in enumerate(zip(buffers, counts, strict=True)):
            assert buffer == pattern(count, seed) + bytes(len(buffer) - count)

    @driven
    async def test_a_batch_of_many_small_reads(self, connect: Connect) -> None:
        buffers = [bytearray(300) for _ in range(4096)]
        await (await connect(Filling())).call(read_request([300] * 4096), [memoryview(each) for each in buffers])
        assert all(buffer == pattern(300, seed) for seed, buffer in enumerate(buffers))

    @driven
    async def test_many_calls_at_once_get_each_its_own_answer(self, connect: Connect, runtime: Runtime) -> None:
        connection = await connect(Filling())

        async def read(size: int) -> None:
            buffer = bytearray(size)
            assert await connection.call(read_request([size]), [memoryview(buffer)]) == ChunksRead([size])
            assert buffer == pattern(size, 0)

        tasks = [runtime.spawn(read(number * 997 % 100_000), f"read-{number}") for number in range(500)]
        for task in tasks:
            await task

    @driven
    async def test_a_slow_call_holds_nobody_up(self, connect: Connect, runtime: Runtime) -> None:
        gated = Gated(runtime)
        connection = await connect(gated)
        slow = runtime.spawn(connection.call(Stat("/")), "slow")  # type: ignore[arg-type]
        await gated.until_began(1)
        assert await connection.call(Usage()) == Done()
        assert not slow.done()
        gated.open()
        assert await slow == Done()

    @driven
    async def test_a_cancelled_read_leaves_its_memory_alone(self, connect: Connect, runtime: Runtime) -> None:
        gated = Gated(runtime)
        connection = await connect(gated)
        buffer = bytearray(100_000)
        read = runtime.spawn(connection.call(read_request([1]), [memoryview(buffer)]), "read")  # type: ignore[arg-type]
        await gated.until_began(1)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        gated.open()
        assert await connection.call(Usage()) == Done()
        assert buffer == bytes(100_000)


class NetworkConformance(ConnectionConformance):
    """What `types.Network` promises, with a server and a client that meet on it."""

    @pytest.fixture
    def server(self, make_network: Callable[[], Network], run: Run) -> Iterator[Network]:
        network = make_network()
        yield network
        run(network.close())

    @pytest.fixture
    def client(self, make_network: Callable[[], Network], run: Run) -> Iterator[Network]:
        network = make_network()
        yield network
        run(network.close())

    @pytest.fixture
    def connect(self, server: Network, client: Network, address: str) -> Connect:
        async def connect(service: Service) -> Connection:
            return client.connection((await server.serve(address, service)).address)

        return connect

    @driven
    async def test_the_way_to_an_address_is_one_object(self, client: Network, server: Network, address: str) -> None:
        listener = await server.serve(address, Echo())
        assert client.connection(listener.address) is client.connection(listener.address)

    @driven
    async def test_where_nobody_listens_nothing_happens(self, client: Network, server: Network, address: str) -> None:
        listener = await server.serve(address, Echo())
        await listener.close()
        with pytest.raises(Unavailable):
            await client.connection(listener.address).call(write_request(0))

    @driven
    async def test_a_server_that_comes_back_is_found(self, client: Network, server: Network, address: str) -> None:
        listener = await server.serve(address, Echo())
        connection = client.connection(listener.address)
        assert await connection.call(Usage()) == Usage()
        await listener.close()
        with pytest.raises(Unavailable):
            await connection.call(Usage())
        await server.serve(listener.address, Echo())
        assert await connection.call(Usage()) == Usage()

    @driven
    async def test_a_loss_tells_what_may_have_happened(
        self, client: Network, server: Network, address: str, runtime: Runtime
    ) -> None:
        gated = Gated(runtime)
        listener = await server.serve(address, gated)
        connection = client.connection(listener.address)
        read = runtime.spawn(outcome(connection.call(Stat("/"))), "read")
        update = runtime.spawn(outcome(connection.call(write_request(0))), "update")
        await gated.until_began(2)
        await listener.close()
        assert type(await read) is Unreachable
        assert type(await update) is UpdateUnknown

    @driven
    async def test_a_call_that_is_not_answered_in_its_time(
        self, client: Network, server: Network, address: str, runtime: Runtime
    ) -> None:
        gated = Gated(runtime)
        connection = client.connection((await server.serve(address, gated)).address)
        assert await connection.call(Usage(), timeout_s=60.0) == Done()
        buffer = bytearray(100_000)
        with pytest.raises(Unanswered, match="did not answer in time"):
            await connection.call(read_request([1]), [memoryview(buffer)], timeout_s=0.3)
        with pytest.raises(UpdateUnknown, match="did not answer in time"):
            await connection.call(write_request(1), [memoryview(bytes(100_000))], timeout_s=0.3)
        await gated.until_began(2)
        gated.open()
        assert await connection.call(read_request([1]), [memoryview(bytearray(7))], timeout_s=60.0) == ChunksRead([7])
        assert buffer == bytes(100_000), "a late answer is nobody's"

    @driven
    async def test_a_server_that_drains_ends_what_began_and_takes_no_more(
        self, client: Network, server: Network, address: str, runtime: Runtime
    ) -> None:
        gated = Gated(runtime)
        listener = await server.serve(address, gated)
        connection = client.connection(listener.address)
        began = runtime.spawn(outcome(connection.call(write_request(0))), "began")
        await gated.until_began(1)
        closing = runtime.spawn(listener.close(drain_s=60.0), "closing")
        while not isinstance(late := await outcome(connection.call(Usage())), Unavailable):
            assert late == Done()
        gated.open()
        assert await began == Done()
        await closing

    @driven
    async def test_a_closed_network_ends_its_calls(
        self, client: Network, server: Network, address: str, runtime: Runtime
    ) -> None:
        gated = Gated(runtime)
        connection = client.connection((await server.serve(address, gated)).address)
        call = runtime.spawn(outcome(connection.call(Stat("/"))), "call")
        await gated.until_began(1)
        await client.close()
        assert type(await call) is Unreachable
        with pytest.raises(StoreClosed):
            await connection.call(Usage())
