"""The way to the metadata servers: a server that dies is a pause, and nothing is done twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from emberfs.client.meta_router import MetaRouter, MetaRouterConfig
from emberfs.errors import EmberError, NotFound, SessionExpired, Unavailable, UpdateUnknown
from emberfs.messages import CloseSession, Done, Link, List, Message, Mkdir, Once, Open, Rename, Stat, Truncate
from emberfs.meta import MetaConfig, MetaService
from emberfs.meta.check import check
from emberfs.meta.clients import PRUNE_EVERY
from emberfs.routing import Routing
from emberfs.testing.sim import SimRuntime, run
from emberfs.testing.sim.network import SimFabric
from emberfs.testing.sim.process import SimProcess
from emberfs.transport.codec import decode_message

from tests.fs.meta_cluster import SlowChunks, SlowKV
from tests.fs.meta_fakes import CHUNK


class FakeRoutes:
    """What a router wants to know, without managers."""

    def __init__(self, runtime: SimRuntime, metas: list[str]) -> None:
        self.routing = Routing(1)
        self.metas = metas
        self.client = b"first".ljust(16)
        self.sessions = 1
        self._runtime = runtime

    async def news(self, than: int, wait_s: float) -> None:
        await self._runtime.sleep(wait_s)

    async def renew(self, expired: bytes) -> None:
        if expired == self.client:
            self.sessions += 1
            self.client = b"session %d" % self.sessions


class Script:
    """A server whose answers are given: errors are raised."""

    def __init__(self, *answers: Message | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[Message] = []

    async def handle(self, request: Message, _: Sequence[memoryview] = ()) -> Message:
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class ScriptConnection:
    def __init__(self, server: Script) -> None:
        self.call = server.handle


class ScriptNetwork:
    def __init__(self, servers: dict[str, Script]) -> None:
        self.connections = {address: ScriptConnection(server) for address, server in servers.items()}

    def connection(self, address: str) -> Any:
        return self.connections[address]


MKDIR = Mkdir("/dir", 0o755, False, False)


def ask(servers: dict[str, Script], *requests: Message) -> list[Any]:
    """The answers of a router, one request after the other, and its routes."""

    async def main(runtime: SimRuntime) -> list[Any]:
        routes: Any = FakeRoutes(runtime, list(servers))
        network: Any = ScriptNetwork(servers)
        router = MetaRouter(runtime, network, routes, config=MetaRouterConfig(deadline_s=3))
        answers: list[Any] = []
        for request in requests:
            try:
                answers.append(await router.call(request))
            except EmberError as error:
                answers.append(error)
        return [*answers, routes]

    return run(0, main)


def test_a_server_is_kept_while_it_answers() -> None:
    servers = {"a": Script(Done()), "b": Script(Done())}
    ask(servers, *[MKDIR] * 9)
    assert sorted(len(server.asked) for server in servers.values()) == [0, 9]
    numbers = [each.number for server in servers.values() for each in server.asked if isinstance(each, Once)]
    assert numbers == list(range(1, 10))


def test_the_next_server_gets_the_same_request() -> None:
    servers = {"a": Script(UpdateUnknown("lost")), "b": Script(UpdateUnknown("lost"), Done())}
    ask(servers, MKDIR)
    asked = [each for server in servers.values() for each in server.asked if isinstance(each, Once)]
    assert {(each.client, each.number, each.request) for each in asked} == {(asked[0].client, 1, asked[0].request)}
    assert decode_message(memoryview(asked[0].request)) == MKDIR


def test_an_answer_is_an_answer() -> None:
    (error, _) = ask({"a": Script(NotFound("no"))}, MKDIR)
    assert isinstance(error, NotFound)


@pytest.mark.parametrize(
    ("request_", "answer", "expected"),
    [
        (MKDIR, Unavailable("down"), Unavailable),
        (MKDIR, UpdateUnknown("lost"), UpdateUnknown),
        (Stat("/"), UpdateUnknown("lost"), Unavailable),
    ],
)
def test_at_the_deadline_it_says_what_is_known(
    request_: Message, answer: Exception, expected: type[EmberError]
) -> None:
    (error, _) = ask({"a": Script(answer), "b": Script(Unavailable("down"))}, request_)
    assert type(error) is expected


def test_without_servers_it_waits_until_the_deadline() -> None:
    (error, _) = ask({}, Stat("/"))
    assert isinstance(error, Unavailable)


def test_a_session_that_ended_is_renewed() -> None:
    server = Script(SessionExpired("ended"), Done())
    answer, _, routes = ask({"a": server}, MKDIR, MKDIR)
    assert answer == Done()
    assert routes.sessions == 2
    asked = [(each.client, each.number) for each in server.asked if isinstance(each, Once)]
    assert asked == [(b"first".ljust(16), 1), (b"session 2", 1), (b"session 2", 2)]


def test_a_session_that_ended_in_doubt_is_told() -> None:
    (error, _) = ask({"a": Script(UpdateUnknown("lost"), SessionExpired("ended"))}, MKDIR)
    assert isinstance(error, UpdateUnknown)


# ---- with real servers


class World:
    """Metadata servers on a simulated network that loses, doubles and delays."""

    def __init__(self, runtime: SimRuntime) -> None:
        self.runtime = runtime
        self.fabric = SimFabric(runtime)
        self.kv = SlowKV(runtime)
        self.chunks = SlowChunks(runtime)
        self.addresses = [f"host-{number}:1" for number in range(3)]
        self.routes: Any = FakeRoutes(runtime, self.addresses)
        self.processes: list[SimProcess] = []
        self.servers: list[MetaService] = []
        for address in self.addresses:
            process = SimProcess(runtime, address)
            self.processes.append(process)
            config = MetaConfig(shared=True, has_settings=True)
            self.servers.append(MetaService(self.kv, process, self.chunks, config=config))
        self.client = SimProcess(runtime, "client")
        self.router = MetaRouter(self.client, self.fabric.network(self.client, "client"), self.routes)

    async def start(self) -> None:
        for address, process, server in zip(self.addresses, self.processes, self.servers, strict=True):
            await process.spawn(server.start(), "start")
            await server.sessions_changed({self.routes.client})
            await self.fabric.network(process, address.partition(":")[0]).serve(address, server)

    async def close(self) -> None:
        for process, server in zip(self.processes, self.servers, strict=True):
            if process.is_alive:
                await process.spawn(server.close(), "close")

    async def __call__(self, request: Message) -> Any:
        return await self.client.spawn(self.router.call(request), "call")


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_server_is_a_pause(seed: int) -> None:
    """Each step would fail, or show, if an earlier one was done twice or not at all."""

    async def main(runtime: SimRuntime) -> None:
        world = World(runtime)
        await world.start()
        world.fabric.faults.reset = world.fabric.faults.doubled = 0.05
        fate = runtime.random("fate")

        async def kill() -> None:
            for victim in fate.sample(range(3), 2):
                await runtime.sleep(fate.uniform(0, 2))
                world.processes[victim].kill()

        async def work(name: str) -> None:
            await world(Mkdir(f"/{name}", 0o755, False, False))
            for turn in range(12):
                path = f"/{name}/{turn}"
                opened = await world(Open(path, True, True, False, 0o644, CHUNK))
                await world(Link(path, path + "l"))
                cut = await world(Truncate("", opened.inode.id, 1 << 20))
                assert cut.inode.truncate_generation == 1
                await world(CloseSession(opened.session, opened.inode.id, 0, 1))
                await world(Rename(path, path + "r", False))

        killing = runtime.spawn(kill(), "kill")
        works = [runtime.spawn(work(name), "work") for name in "abc"]
        for task in works:
            await task
        await killing
        for name in "abc":
            entries = (await world(List(f"/{name}", "", 100))).entries
            assert [entry for entry, _ in entries] == sorted(f"{turn}{end}" for turn in range(12) for end in "lr")
            assert {inode.nlink for _, inode in entries} == {2}
        assert await check(world.kv, world.chunks) == []
        await world.close()
        world.client.kill()

    run(seed, main)


def test_answers_are_not_kept_for_ever() -> None:
    async def main(runtime: SimRuntime) -> None:
        world = World(runtime)
        await world.start()
        for _ in range(2 * PRUNE_EVERY):
            await world(Mkdir("/dir", 0o755, False, True))
        assert len(await world.kv.begin().range(b"O", b"P")) <= PRUNE_EVERY
        await world.close()
        world.client.kill()

    run(0, main)
