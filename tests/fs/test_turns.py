"""Whose request is begun next. A virtual clock, and a worker that begins and ends when the test says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from emberfs.errors import Overloaded
from emberfs.testing.sim.loop import SimRuntime, run
from emberfs.transport.turns import (
    CALL_COST_BYTES,
    QUANTUM_BYTES,
    SHARES,
    SMALL_BYTES_MAX,
    UNSENT_BYTES_MAX,
    Line,
    LoadConfig,
    Turn,
    Turns,
)

MIB = 1 << 20
PART = 2 * MIB
FEW = LoadConfig(bytes_max=64 * PART, calls_max=16, waiting_max=100, wait_s_max=1.0)

MANY = LoadConfig(bytes_max=1 << 40, calls_max=1 << 20)
"""There is room for all at once: only their order counts."""


class Asked(Turn):
    """A request of `client`."""

    def __init__(self, server: Server, client: str, *, held_bytes: int, fills_bytes: int) -> None:
        super().__init__(held_bytes=held_bytes, fills_bytes=fills_bytes, weight=held_bytes + fills_bytes)
        self.server, self.client = server, client

    def begin(self) -> None:
        self.server.began.append(self.client)
        self.server.under_way.append((self.client, self))
        self.server.held_bytes_max = max(self.server.held_bytes_max, self.server.turns.held_bytes)

    def refuse(self, error: Overloaded) -> None:
        self.server.refused.append(self.client)
        self.server.turns.end(self.server.lines[self.client], self)


class Server:
    """Begins what it may, and keeps the order."""

    def __init__(self, runtime: SimRuntime, config: LoadConfig = FEW) -> None:
        self.runtime = runtime
        self.turns = Turns(runtime, config)
        self.lines: dict[str, Line] = {}
        self.began: list[str] = []
        self.refused: list[str] = []
        self.under_way: list[tuple[str, Turn]] = []
        self.held_bytes_max = 0

    def ask(self, client: str, fills_bytes: int = 4096, *, held_bytes: int = 100) -> Turn:
        """A request of `client`. Raises Overloaded."""
        line = self.lines.setdefault(client, Line())
        turn = Asked(self, client, held_bytes=held_bytes, fills_bytes=fills_bytes)
        self.turns.admit(line, turn)
        self.turns.enter(line, turn, at_once=False)
        return turn

    def end(self, client: str = "", *, reads: bool = True) -> None:
        """The oldest call (of `client`) is answered; `reads`: and the client takes the answer."""
        place = next(at for at, (name, _) in enumerate(self.under_way) if client in ("", name))
        name, turn = self.under_way.pop(place)
        self.turns.answer(self.lines[name], turn, turn.fills_bytes)
        if reads:
            self.turns.end(self.lines[name], turn)

    async def rounds(self) -> None:
        """Until nothing more begins."""
        await self.runtime.sleep(1e-3)


def on_server(work: Callable[[Server], Awaitable[None]], config: LoadConfig = FEW) -> None:
    async def main(runtime: SimRuntime) -> None:
        server = Server(runtime, config)
        await work(server)
        for client in server.lines:
            server.turns.leave(server.lines[client])
        while server.under_way:
            server.end()
        await runtime.sleep(60.0)
        assert server.turns.waiting == server.turns.calls == 0

    run(0, main)


def test_one_call_is_not_behind_a_thousand() -> None:
    async def work(server: Server) -> None:
        for _ in range(1000):
            server.ask("greedy")
        server.ask("modest")
        await server.rounds()
        assert server.began.index("modest") <= QUANTUM_BYTES // CALL_COST_BYTES + 1

    on_server(work, MANY)


def test_clients_get_alike_many_bytes() -> None:
    async def work(server: Server) -> None:
        for _ in range(1000):
            server.ask("small", 64 << 10)
            server.ask("large", MIB)
        await server.rounds()
        counts = Counter(server.began[:900])
        weights = {
            name: counts[name] * (size + CALL_COST_BYTES) for name, size in [("small", 64 << 10), ("large", MIB)]
        }
        assert 0.8 < weights["small"] / weights["large"] < 1.25

    on_server(work, MANY)


@pytest.mark.parametrize("size", [4096, PART, 32 * PART])
def test_memory_and_calls_are_bounded(size: int) -> None:
    async def work(server: Server) -> None:
        for number in range(60):
            server.ask(f"client {number % 6}", size)
        await server.rounds()
        assert server.turns.calls <= FEW.calls_max + 6
        assert server.turns.waiting > 0
        assert server.held_bytes_max <= FEW.bytes_max + 6 * SMALL_BYTES_MAX
        while server.under_way:
            server.end()
            await server.rounds()
        assert sorted(server.began) == sorted(f"client {number % 6}" for number in range(60))
        assert server.held_bytes_max <= FEW.bytes_max + 6 * SMALL_BYTES_MAX

    on_server(work)


def test_a_slow_disk_does_not_hold_up_others() -> None:
    """Those who wait for it have all the calls that there are: others' small ones begin all the same."""

    async def work(server: Server) -> None:
        for number in range(40):
            server.ask(f"slow {number % 20}", PART)
        await server.rounds()
        for _ in range(3):
            server.ask("quick")
            await server.rounds()
            assert server.began[-1] == "quick"
            server.end("quick")

    on_server(work)


def test_one_client_does_not_take_all() -> None:
    async def work(server: Server) -> None:
        for _ in range(50):
            server.ask("greedy", PART)
        await server.rounds()
        assert server.turns.calls == FEW.calls_max // 2
        for _ in range(FEW.calls_max // SHARES):
            server.ask("other", PART)
        await server.rounds()
        assert server.began.count("other") == FEW.calls_max // SHARES

    on_server(work)


def test_a_large_call_is_not_overtaken_for_ever() -> None:
    async def work(server: Server) -> None:
        for number in range(7):
            server.ask(f"client {number}", 8 * PART)
        server.ask("large", 40 * PART)
        await server.rounds()
        for number in range(7):
            server.ask(f"late {number}", PART)
        await server.rounds()
        assert len(server.began) == 7, "there is room for the late ones, but not before it"
        for _ in range(5):
            server.end()
        await server.rounds()
        assert server.began[7] == "large"
        assert len(server.began) == 15

    on_server(work)


def test_payloads_that_wait_are_not_behind_a_read_that_waits_for_their_memory() -> None:
    async def work(server: Server) -> None:
        for number in range(4):
            server.ask(f"writer {number}", held_bytes=15 * PART, fills_bytes=0)
        for number in range(2):
            server.ask(f"reader {number}", 8 * PART)
        await server.rounds()
        assert {name for name in server.began if "writer" in name} == {f"writer {number}" for number in range(4)}
        while server.under_way:
            server.end()
            await server.rounds()
        assert {"reader 0", "reader 1"} < set(server.began)

    on_server(work)


def test_who_does_not_read_holds_up_nobody_who_waits_for_memory() -> None:
    async def work(server: Server) -> None:
        server.ask("deaf", UNSENT_BYTES_MAX + 1)
        await server.rounds()
        for number in range(7):
            server.ask(f"client {number}", 9 * PART)
        server.ask("deaf", 8 * PART)
        await server.rounds()
        server.end("deaf", reads=False)
        server.ask("late", PART // 2)
        server.end("client 0")
        await server.rounds()
        assert "late" in server.began
        assert server.began.count("deaf") == 1

    on_server(work)


def test_who_does_not_read_replies_begins_nothing() -> None:
    async def work(server: Server) -> None:
        for _ in range(50):
            server.ask("deaf", UNSENT_BYTES_MAX // 4)
        for _ in range(5):
            await server.rounds()
            while server.under_way:
                server.end(reads=False)
        assert server.began.count("deaf") <= 5 + FEW.calls_max // 2
        server.ask("other", PART)
        await server.rounds()
        assert server.began[-1] == "other"
        await server.runtime.sleep(3.0)
        assert len(server.refused) + server.began.count("deaf") == 50
        with pytest.raises(Overloaded):
            for _ in range(1000):
                server.ask("deaf", held_bytes=PART)

    on_server(work)


def test_what_waits_too_long_is_refused() -> None:
    async def work(server: Server) -> None:
        for number in range(40):
            server.ask(f"client {number % 4}", PART)
        await server.rounds()
        waiting = server.turns.waiting
        assert waiting
        await server.runtime.sleep(0.6)
        with pytest.raises(Overloaded, match="what came before"):
            server.ask("client 0")
        await server.runtime.sleep(0.7)
        assert (server.turns.waiting, len(server.refused)) == (0, waiting)

    on_server(work)


def test_too_many_are_refused_but_not_the_first_of_a_client() -> None:
    async def work(server: Server) -> None:
        for _ in range(FEW.waiting_max):
            server.ask("greedy", PART)
        with pytest.raises(Overloaded, match="calls wait") as caught:
            server.ask("greedy", PART)
        assert 0 < caught.value.retry_after_s <= FEW.wait_s_max
        server.ask("modest")

    on_server(work)


def test_payloads_beyond_the_memory_are_refused() -> None:
    async def work(server: Server) -> None:
        for number in range(4):
            server.ask(f"client {number}", held_bytes=16 * PART, fills_bytes=0)
        with pytest.raises(Overloaded, match="bytes are taken"):
            server.ask("late", held_bytes=PART, fills_bytes=0)
        server.ask("small", held_bytes=SMALL_BYTES_MAX, fills_bytes=0)
        await server.rounds()
        assert "small" in server.began
        server.end("client 0")
        server.ask("late", held_bytes=PART, fills_bytes=0)

    on_server(work)


def test_what_is_withdrawn_does_not_begin() -> None:
    async def work(server: Server) -> None:
        first, second = server.ask("client"), server.ask("client")
        line = server.lines["client"]
        assert server.turns.withdraw(line, second)
        server.turns.end(line, second)
        await server.rounds()
        assert server.began == ["client"]
        assert not server.turns.withdraw(line, first)

    on_server(work)


def test_limits_that_make_no_sense_are_refused() -> None:
    for bad in ({"bytes_max": 1}, {"calls_max": 1}, {"waiting_max": 0}, {"wait_s_max": 0.0}):
        with pytest.raises(ValueError, match=r"room|wait_s_max"):
            LoadConfig(**bad)  # type: ignore[arg-type]
