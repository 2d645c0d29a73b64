"""A server process where something is in its way. Run: pytest tests/fs/test_server_process.py"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from emberfs.client.routes import FOLLOW_RETRY_S, Routes
from emberfs.disk import LocalDisk
from emberfs.engine import ChunkEngine, EngineConfig
from emberfs.errors import AccessDenied, AlreadyExists, StoreClosed, Unavailable
from emberfs.kv import LmdbKV
from emberfs.messages import Done, GetRouting, Heartbeat, HeartbeatReply, Message, RoutingReply, TargetReport
from emberfs.portal import Portal
from emberfs.routing import Node, Role, Routing, Target
from emberfs.runtime import AsyncioRuntime
from emberfs.server import ServerConfig, write_config
from emberfs.server.heart import Heart
from emberfs.server.roles import node_of, open_role
from emberfs.settings import Config, Settings
from emberfs.sharing.ownership import Mode, Ownership
from emberfs.testing.sim.loop import SimRuntime, run

from tests.fs.cli_run import start_emberline

TARGET = b"t" * 16


class Manager:
    """The only manager: answers with what `answers` makes of a request."""

    def __init__(self, answer: Callable[[Any], Message]) -> None:
        self.answer = answer
        self.is_closed = False
        self.calls = 0

    def connection(self, address: str) -> Any:
        if self.is_closed:
            self.calls += 1
            assert self.calls < 100, "it asks a closed network for ever"
            raise StoreClosed("the network was closed")
        return self

    async def call(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        return self.answer(request)


def config_of(role: Role, directory: Path, *, listen: str = "127.0.0.1:0") -> ServerConfig:
    return ServerConfig(
        name=f"{role}-1", role=role, listen=listen, managers=["127.0.0.1:1"], directory=str(directory / "data")
    )


def last_words(config: ServerConfig, path: Path) -> str:
    """What a process with these settings says when it fails at its start."""
    write_config(path, config)
    with start_emberline("server", "--config", path) as process:
        try:
            output, errors = process.communicate(timeout=20)
        finally:
            process.kill()  # Should it serve.
    assert process.returncode == 1
    assert output == b"", "it said that it is ready"
    assert b"Traceback" not in errors
    return errors.decode().splitlines()[-1]


@pytest.mark.parametrize("role", [Role.KV, Role.STORAGE])
def test_a_directory_that_another_process_has_open_is_refused(role: Role, tmp_path: Path) -> None:
    config = config_of(role, tmp_path)
    Path(config.directory).mkdir()
    ownership = Ownership.take(Path(config.directory))
    assert ownership is not None
    ownership.declare(Mode.INLINE)
    said = last_words(config, tmp_path / "config.toml")
    ownership.close()
    assert f"process {os.getpid()} has this directory open" in said
    assert [path.name for path in Path(config.directory).iterdir()] == ["owner.lock"]


def test_a_process_whose_port_is_taken_ends_and_leaves_the_disk_alone(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = last_words(config_of(Role.KV, tmp_path, listen=address), tmp_path / "config.toml")
    assert said == f"Error: Address already in use: {address}"
    assert not (tmp_path / "data").exists()


def test_a_process_whose_metrics_port_is_taken_ends(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = ServerConfig(
            name="kv-1", role=Role.KV, listen="127.0.0.1:0", directory=str(tmp_path / "data"), metrics=address
        )
        assert last_words(config, tmp_path / "config.toml") == f"Error: Address already in use: {address}"


def test_who_follows_the_routing_ends_with_its_network() -> None:
    async def main(sim: SimRuntime) -> None:
        manager: Any = Manager(lambda request: RoutingReply(Routing(1)) if type(request) is GetRouting else Done())
        original = manager.call

        async def slowly(request: Message) -> Message:
            await sim.sleep(0.1)
            return await original(request)  # type: ignore[no-any-return]

        manager.call = slowly
        routes = Routes(sim, manager, ["m:1"])
        await routes.start()
        manager.is_closed = True
        for task in routes.tasks:
            await task
        await routes.close()

    run(0, main)


def test_a_manager_that_holds_no_question_is_not_asked_without_a_pause() -> None:
    async def main(sim: SimRuntime) -> None:
        asked = list[GetRouting]()

        def answer(request: Message) -> Message:
            if not isinstance(request, GetRouting):
                return Done()
            asked.append(request)
            assert len(asked) < 1000
            return RoutingReply(Routing(1))

        network: Any = Manager(answer)
        routes = Routes(sim, network, ["m:1"])
        await routes.start()
        await sim.sleep(5.0)
        assert 10 < len(asked) <= 5.0 / FOLLOW_RETRY_S + 2
        await routes.close()

    run(0, main)


def test_a_heart_goes_on_after_a_mistake_in_what_takes_the_routing() -> None:
    taken: list[int] = []

    async def take(routing: Routing) -> None:
        taken.append(routing.version)
        assert len(taken) > 1, "a mistake"

    async def main(sim: SimRuntime) -> None:
        versions = iter(range(1, 100))

        def answer(request: Message) -> Message:
            if isinstance(request, GetRouting):
                return RoutingReply(None)
            return HeartbeatReply(Routing(next(versions)), 0, None)

        manager: Any = Manager(answer)
        heart = Heart(sim, manager, ["m:1"], Node("n", Role.META, "n:1", b"i"), on_routing=take)
        heart.start()
        await sim.sleep(Settings().heartbeat_s * 2.5)
        assert not heart.tasks[0].done()
        await heart.close()

    run(0, main)
    assert taken == [1, 2, 3]


def test_a_heart_takes_the_configuration_first_and_goes_by_it() -> None:
    heard: list[object] = []

    async def take(what: object) -> None:
        heard.append(what)

    async def main(sim: SimRuntime) -> None:
        config = Config(4, {"heartbeat_s": 2.0}, (), 9.0)

        def answer(request: Message) -> Message:
            if not isinstance(request, Heartbeat):
                return RoutingReply(None)
            heard.append(request.config_version)
            return HeartbeatReply(None, 1, [b"c"], config=None if request.config_version == 4 else config)

        manager: Any = Manager(answer)
        node = Node("n", Role.META, "n:1", b"i")
        heart = Heart(sim, manager, ["m:1"], node, on_sessions=take, on_config=heard.append)
        heart.start()
        await sim.sleep(2.1)
        await heart.close()
        assert heard == [0, config, [b"c"], 4, [b"c"]]

    run(0, main)


def test_a_heart_that_is_hurried_beats_at_once() -> None:
    beats: list[float] = []

    async def main(sim: SimRuntime) -> None:
        def answer(request: Message) -> Message:
            if isinstance(request, GetRouting):
                return RoutingReply(None)
            beats.append(sim.now_s())
            if len(beats) == 2:
                heart.hurry()  # What the beat under way brings may be too old.
            return HeartbeatReply(None, 0, None)

        manager: Any = Manager(answer)
        heart = Heart(sim, manager, ["m:1"], Node("n", Role.META, "n:1", b"i"))
        heart.hurry()  # It has not begun: nothing to hurry.
        heart.start()
        await sim.sleep(Settings().heartbeat_s / 2)
        assert len(beats) == 1
        began_s = sim.now_s()
        heart.hurry()
        await sim.sleep(Settings().heartbeat_s / 2)
        assert len(beats) == 3
        assert beats[2] - began_s < Settings().heartbeat_s / 4
        await sim.sleep(Settings().heartbeat_s)
        assert len(beats) == 4, "it goes on in its own time"
        await heart.close()

    run(0, main)


def test_a_heart_stops_when_another_process_has_taken_the_name() -> None:
    """A server that nobody tells of sessions any more must not go on: its process ends, and is started again."""

    def refuse(_: Message) -> Message:
        raise AlreadyExists("another process has taken over as n")

    async def main(sim: SimRuntime) -> None:
        manager: Any = Manager(refuse)
        heart = Heart(sim, manager, ["m:1"], Node("n", Role.META, "n:1", b"i"))
        heart.start()
        await sim.sleep(Settings().heartbeat_s)
        assert isinstance(heart.tasks[0].exception(), AlreadyExists)
        await heart.close()

    run(0, main)


def test_a_heart_that_nobody_hears_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    deaf = [True]

    def answer(request: Message) -> Message:
        if deaf[0]:
            raise AccessDenied("another authority")
        return HeartbeatReply(None, 0, None) if isinstance(request, Heartbeat) else RoutingReply(None)

    async def main(sim: SimRuntime) -> None:
        manager: Any = Manager(answer)
        heart = Heart(sim, manager, ["m:1"], Node("n", Role.META, "n:1", b"i"))
        heart.start()
        await sim.sleep(10.0)
        deaf[0] = False
        await sim.sleep(10.0)
        await heart.close()

    caplog.set_level("INFO", logger="emberline")
    run(0, main)
    assert [record.getMessage() for record in caplog.records] == [
        "no manager takes our heartbeat: another authority",
        "a manager takes our heartbeat again",
    ]


def test_a_target_that_could_not_be_opened_is_opened_once_it_is_mended(tmp_path: Path) -> None:
    runtime = AsyncioRuntime()
    portal = Portal(runtime)
    config = config_of(Role.STORAGE, tmp_path)
    routing = Routing(1, (node_of(config, b"i"),), (Target(TARGET, config.name, 1),))
    index = tmp_path / "data" / f"target-{TARGET.hex()}" / "index"
    index.mkdir(parents=True)
    portal.run(make_target(index, runtime, target=b"x" * 16))  # Another one lies there.
    asked: list[GetRouting] = []
    heard = runtime.future()

    def answer(request: Any) -> Message:
        if isinstance(request, Heartbeat):
            if not heard.done():
                heard.set_result(request.reports)
            return HeartbeatReply(routing, 0, None)
        if request.wait_s:
            raise Unavailable("no news")
        asked.append(request)
        if len(asked) == 2:
            for path in index.iterdir():
                path.unlink()
        return RoutingReply(routing)

    network: Any = Manager(answer)

    async def first_reports() -> list[TargetReport]:
        role = await open_role(config, runtime, network)
        await role.start()
        reports: list[TargetReport] = await heard
        await role.close()
        return reports

    (report,) = portal.run(first_reports())
    runtime.stop()
    assert len(asked) == 2, "it opens at the second attempt"
    assert report.target == TARGET
    assert report.generation


def test_a_disk_that_was_not_mounted_shows_its_old_content_when_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renames stand for the mounts: what is found at the path is another directory."""

    async def own(directory: Path, _: AsyncioRuntime) -> None:
        directory.mkdir(exist_ok=True)  # The lock is held until the process ends, and this is one process.

    monkeypatch.setattr("emberfs.server.roles._own", own)
    path, disk, blank = tmp_path / "data", tmp_path / "disk", tmp_path / "blank"
    (known,) = reports_of_a_server(tmp_path)
    path.rename(disk)
    (unknown,) = reports_of_a_server(tmp_path)
    assert unknown.generation not in (b"", known.generation)
    path.rename(blank)
    disk.rename(path)
    assert reports_of_a_server(tmp_path)[0].generation == known.generation


def reports_of_a_server(directory: Path) -> list[TargetReport]:
    """What a storage server says of its targets at first, when `directory` is its."""
    runtime = AsyncioRuntime()
    portal = Portal(runtime)
    config = config_of(Role.STORAGE, directory)
    routing = Routing(1, (node_of(config, b"i"),), (Target(TARGET, config.name, 1),))
    heard = runtime.future()

    def answer(request: Any) -> Message:
        if not isinstance(request, Heartbeat):
            return RoutingReply(routing)
        if not heard.done():
            heard.set_result(request.reports)
        return HeartbeatReply(routing, 0, None)

    async def first_reports() -> list[TargetReport]:
        network: Any = Manager(answer)
        role = await open_role(config, runtime, network)
        await role.start()
        reports: list[TargetReport] = await heard
        await role.close()
        return reports

    reports = portal.run(first_reports())
    runtime.stop()
    return reports


async def make_target(index: Path, runtime: AsyncioRuntime, *, target: bytes) -> None:
    kv = LmdbKV.open(index, runtime)
    engine = await ChunkEngine.open(
        LocalDisk(str(index.parent), runtime), kv, runtime, config=EngineConfig(target=target)
    )
    await engine.close()
    await kv.close()
