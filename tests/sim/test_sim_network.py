"""Simulated processes and the network between them: what they do to the services on top.

Run: pytest tests/sim/test_sim_network.py
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from emberfs.errors import EmberError, NotFound, Unanswered, Unavailable
from emberfs.messages import ChunksRead, Done, GetRouting, Message, OpenSession, ReadChunks, WriteChunks
from emberfs.testing.sim.loop import SimRuntime, run
from emberfs.testing.sim.network import CONNECT_TIMEOUT_S, KEEPALIVE_S, SimFabric, SimNetwork
from emberfs.testing.sim.process import SimProcess

PING = OpenSession(bytes(16))


class Echo:
    """A service that says what it did, and when."""

    def __init__(self, process: SimProcess, *, takes_s: float = 0.0) -> None:
        self.process = process
        self.takes_s = takes_s
        self.begun = 0
        self.ended = 0
        self.payloads: list[bytes] = []

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        self.begun += 1
        try:
            if self.takes_s:
                await self.process.sleep(self.takes_s)
            if isinstance(request, ReadChunks):
                buffers[0][:3] = b"abc"
                return ChunksRead([3])
            if isinstance(request, WriteChunks):
                self.payloads.append(bytes(buffers[0]))
                return Done()
            raise NotFound("no such file", "/a")
        finally:
            self.ended += 1


class Hosts:
    """A client and a server."""

    def __init__(self, runtime: SimRuntime) -> None:
        self.runtime = runtime
        self.fabric = SimFabric(runtime)
        self.client = SimProcess(runtime, "client")
        self.network = self.fabric.network(self.client, "client")
        self.call = self.network.connection("server:1").call

    async def serve(self, *, takes_s: float = 0.0) -> tuple[SimProcess, Echo]:
        process = SimProcess(self.runtime, "server")
        echo = Echo(process, takes_s=takes_s)
        await self.fabric.network(process, "server").serve("server:1", echo)
        return process, echo

    async def outcome(self, message: Message = PING, buffers: Sequence[memoryview] = ()) -> tuple[str, float]:
        """How a call ends, and after how many seconds."""
        start = self.runtime.now_s()
        try:
            name = type(await self.call(message, buffers)).__name__
        except EmberError as error:
            name = type(error).__name__
        return name, self.runtime.now_s() - start


def on_hosts(work: Callable[[Hosts], Awaitable[Any]], seed: int = 0) -> Any:
    async def main(runtime: SimRuntime) -> Any:
        hosts = Hosts(runtime)
        result = await work(hosts)
        await runtime.sleep(60)
        hosts.client.kill()
        return result

    return run(seed, main)


def write() -> WriteChunks:
    return WriteChunks(b"c" * 16, 1, 1, [1], [b"k"], [0], 1 << 16)


def test_errors_arrive_as_their_own_class_with_their_fields() -> None:
    async def work(hosts: Hosts) -> None:
        process, _ = await hosts.serve()
        with pytest.raises(NotFound) as caught:
            await hosts.call(PING)
        assert caught.value.path == "/a"
        process.kill()

    on_hosts(work)


def test_payload_is_copied_at_the_sender_and_arrives_with_the_reply() -> None:
    async def work(hosts: Hosts) -> None:
        process, echo = await hosts.serve(takes_s=1)
        payload, destination = bytearray(b"before"), bytearray(5)
        writing = hosts.runtime.spawn(hosts.call(write(), [memoryview(payload)]), "write")
        reading = hosts.runtime.spawn(hosts.call(ReadChunks([1], [b"k"], [0]), [memoryview(destination)]), "read")
        await hosts.runtime.sleep(0.5)
        payload[:] = b"after."
        assert await writing == Done()
        assert echo.payloads == [b"before"]
        assert bytes(destination[:3]) in (b"\0\0\0", b"abc")
        assert (await reading).counts == [3]
        assert bytes(destination) == b"abc\0\0"
        process.kill()

    on_hosts(work)


def test_a_call_to_nobody_did_not_happen_and_says_so_at_once() -> None:
    async def work(hosts: Hosts) -> None:
        name, seconds = await hosts.outcome()
        assert name == "Unreachable" and seconds < 0.1

    on_hosts(work)


@pytest.mark.parametrize("message", [PING, write()])
def test_the_time_of_a_call_counts_while_it_connects(message: Message) -> None:
    async def work(hosts: Hosts) -> None:
        process, echo = await hosts.serve()
        hosts.fabric.cut("client", "server")
        began_s = hosts.runtime.now_s()
        with pytest.raises(Unanswered):
            await hosts.call(message, [memoryview(b"payload")], timeout_s=0.25)
        assert hosts.runtime.now_s() - began_s == pytest.approx(0.25)
        hosts.fabric.heal()
        await hosts.runtime.sleep(30.0)
        assert echo.begun == 0
        process.kill()

    on_hosts(work)


def test_the_death_of_the_server_breaks_calls_and_runs_none_of_its_code() -> None:
    async def work(hosts: Hosts) -> None:
        process, echo = await hosts.serve(takes_s=1)
        calling = hosts.runtime.spawn(hosts.outcome(), "call")
        await hosts.runtime.sleep(0.5)
        process.kill()
        name, seconds = await calling
        assert name == "UpdateUnknown" and seconds < 0.6
        assert (echo.begun, echo.ended) == (1, 0)
        assert (await hosts.outcome())[0] == "Unreachable"
        again, _ = await hosts.serve()
        assert (await hosts.outcome())[0] == "NotFound"
        again.kill()

    on_hosts(work)


def test_the_death_of_the_client_stops_no_request_on_its_way() -> None:
    async def work(hosts: Hosts) -> None:
        process, echo = await hosts.serve()
        with pytest.raises(NotFound):
            await hosts.call(PING)
        hosts.client.spawn(hosts.call(write(), [memoryview(b"late")]), "write")
        hosts.runtime.loop.call_later(5e-5, hosts.client.kill)  # before anything can have arrived
        await hosts.runtime.sleep(1)
        assert echo.payloads == [b"late"]
        process.kill()

    on_hosts(work)


def test_a_question_that_changes_nothing_did_not_happen_when_the_connection_breaks() -> None:
    async def work(hosts: Hosts) -> None:
        process, _ = await hosts.serve(takes_s=1)
        calling = hosts.runtime.spawn(hosts.outcome(GetRouting()), "call")
        await hosts.runtime.sleep(0.5)
        process.kill()
        assert (await calling)[0] == "Unreachable"

    on_hosts(work)


def test_a_short_pause_delays_and_a_long_one_breaks_the_connection() -> None:
    async def work(hosts: Hosts) -> None:
        process, echo = await hosts.serve()
        for pause_s in (1.0, KEEPALIVE_S + 1):
            calling = hosts.runtime.spawn(hosts.outcome(), "call")
            process.pause()
            hosts.fabric.suspect("server")
            await hosts.runtime.sleep(pause_s)
            process.resume()
            name, seconds = await calling
            assert (name, seconds > 1) == ("NotFound" if pause_s < KEEPALIVE_S else "UpdateUnknown", True)
        await hosts.runtime.sleep(1)
        assert echo.ended == 2, "a paused server does what it was asked when it goes on"
        process.kill()

    on_hosts(work)


@pytest.mark.parametrize("cut", [("client", "server"), ("server", "client")])
def test_a_cut_either_way_loses_the_answer_then_refuses_then_heals(cut: tuple[str, str]) -> None:
    async def work(hosts: Hosts) -> None:
        process, echo = await hosts.serve()
        await hosts.outcome()
        hosts.fabric.cut(*cut)
        name, seconds = await hosts.outcome()
        assert name == "UpdateUnknown" and seconds >= KEEPALIVE_S - 1e-6
        assert echo.begun == (1 if cut[0] == "client" else 2)
        name, seconds = await hosts.outcome()
        assert name == "Unreachable" and seconds >= CONNECT_TIMEOUT_S - 1e-6
        hosts.fabric.heal()
        assert (await hosts.outcome())[0] == "NotFound"
        process.kill()

    on_hosts(work)


@pytest.mark.parametrize("fault", ["lost", "reset", "doubled", "slow"])
def test_faults_happen_and_stay_within_the_contract(fault: str, seeds: Sequence[int]) -> None:
    async def work(hosts: Hosts) -> tuple[set[str], int, int]:
        process, echo = await hosts.serve()
        setattr(hosts.fabric.faults, fault, 0.3)
        calls = 20
        names = {(await hosts.outcome(write(), [memoryview(b"x")]))[0] for _ in range(calls)}
        await hosts.runtime.sleep(20)
        process.kill()
        return names, echo.begun, calls

    outcomes: set[str] = set()
    handled = sent = 0
    for seed in seeds:
        names, begun, calls = on_hosts(work, seed)
        outcomes |= names
        handled += begun
        sent += calls
    expected = {"Done"} if fault in ("doubled", "slow") else {"Done", "UpdateUnknown"}
    assert outcomes == expected
    assert (handled > sent) == (fault == "doubled")
    assert (handled < sent) == (fault in ("lost", "reset"))


def test_requests_overtake_each_other() -> None:
    async def work(hosts: Hosts) -> list[bytes]:
        process, echo = await hosts.serve()
        await hosts.outcome()
        calls = [hosts.call(write(), [memoryview(b"%d" % number)]) for number in range(4)]
        tasks = [hosts.runtime.spawn(call, "write") for call in calls]  # type: ignore[arg-type]
        for task in tasks:
            await task
        process.kill()
        return echo.payloads

    assert len({tuple(on_hosts(work, seed)) for seed in range(20)}) > 3


def test_a_listener_that_closes_lets_calls_end() -> None:
    async def work(hosts: Hosts) -> None:
        process = SimProcess(hosts.runtime, "server")
        echo = Echo(process, takes_s=1)
        network: SimNetwork = hosts.fabric.network(process, "server")
        listener = await network.serve("server:0", echo)
        call = hosts.network.connection(listener.address).call
        calling = hosts.runtime.spawn(call(write(), [memoryview(b"x")]), "call")  # type: ignore[arg-type]
        await hosts.runtime.sleep(0.5)
        await listener.close(drain_s=5)
        with pytest.raises(Unavailable):
            await hosts.network.connection(listener.address).call(PING)
        assert await calling == Done()

    on_hosts(work)


def test_a_network_that_was_closed_breaks_its_calls() -> None:
    async def work(hosts: Hosts) -> None:
        process, _ = await hosts.serve(takes_s=1)
        calling = hosts.runtime.spawn(hosts.outcome(), "call")
        await hosts.runtime.sleep(0.5)
        await hosts.network.close()
        assert (await calling)[0] == "UpdateUnknown"
        with pytest.raises(Unavailable):
            await hosts.call(PING)
        process.kill()

    on_hosts(work)


def test_clocks_drift_and_sleep_goes_by_them() -> None:
    async def main(runtime: SimRuntime) -> None:
        fast, slow = SimProcess(runtime, "fast", drift=0.02), SimProcess(runtime, "slow", drift=-0.02, origin_s=7)
        await runtime.sleep(100)
        assert fast.now_s() == pytest.approx(102) and slow.now_s() == pytest.approx(105)
        start = runtime.now_s()
        await fast.sleep(51)
        assert runtime.now_s() - start == pytest.approx(50)

    run(0, main)


def test_a_paused_process_fires_its_timers_when_it_goes_on() -> None:
    async def main(runtime: SimRuntime) -> None:
        process = SimProcess(runtime, "p")
        woken: list[float] = []

        async def nap() -> None:
            await process.sleep(1)
            woken.append(runtime.now_s())

        task = process.spawn(nap(), "nap")
        await runtime.sleep(0.5)
        process.pause()
        await runtime.sleep(9.5)
        process.resume()
        await task
        assert woken == [10.0]

    run(0, main)


def test_an_assertion_in_a_service_fails_the_simulation() -> None:
    class Wrong:
        async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
            raise AssertionError("cannot be")

    async def work(hosts: Hosts) -> None:
        process = SimProcess(hosts.runtime, "server")
        await hosts.fabric.network(process, "server").serve("server:1", Wrong())
        await hosts.call(PING)

    with pytest.raises(AssertionError) as caught:
        on_hosts(work)
    assert any("cannot be" in note for note in caught.value.__notes__) or "cannot be" in str(caught.value.__cause__)


def test_a_seed_replays_through_network_and_death() -> None:
    def traced(seed: int) -> str:
        runtime = SimRuntime(seed)

        async def main(runtime: SimRuntime) -> None:
            hosts = Hosts(runtime)
            hosts.fabric.faults.reset = hosts.fabric.faults.doubled = 0.2
            for _ in range(5):
                process, _ = await hosts.serve(takes_s=0.01)
                for _ in range(5):
                    await hosts.outcome(write(), [memoryview(b"x")])
                process.kill()
            hosts.client.kill()

        runtime.run(main)
        return runtime.trace_hash()

    assert traced(3) == traced(3) != traced(4)
