"""Where the time of a client's calls went: in itself, on the network, and in which part of which server.

The client knows what its calls took and how much of that it waited for servers. Each server knows what it took for the
requests of a kind, and which part was queue, disk, and waiting for servers behind it. What the client waited for beyond
that is the network, and what lies between: the queues of sockets and of event loops.

The parts of a span always add up to what its calls took. How the servers' share is split is exact if nobody else uses
the store; else it is split as it is for everybody's requests of the same kinds.

Does not know: what the calls were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from ..client.sync import Client
from ..ledger import ClientStats, OperationStats
from ..meter import STAGES, KindStats
from .servers import QUESTIONS, Look, between, look

BEHIND = frozenset({"Forward", "AskCommitted", "KvGet", "KvScan", "KvCommit"})
"""What servers ask of the servers behind them while a client waits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Seconds of all calls together."""

    client: float = 0.0
    network: float = 0.0
    queue: float = 0.0
    disk: float = 0.0
    work: float = 0.0

    @property
    def total(self) -> float:
        return self.client + self.network + self.queue + self.disk + self.work

    def __add__(self, other: Shares) -> Shares:
        return Shares(**{name: seconds + getattr(other, name) for name, seconds in asdict(self).items()})

    def per(self, count: int) -> Shares:
        """Of one, where these are of `count`."""
        return Shares(**{name: seconds / count for name, seconds in asdict(self).items()})

    def fractions(self) -> dict[str, float]:
        """Of the whole; zeros if nothing was done."""
        return {name: seconds / (self.total or 1.0) for name, seconds in asdict(self).items()}


class Span:
    """What was done between the ends of a `span`."""

    def __init__(self) -> None:
        self.calls = 0
        self.shares = Shares()
        self.looks: list[Look] = []


@contextmanager
def span(client: Client) -> Iterator[Span]:
    """Calls of `client` in the block are attributed when it ends. Nobody else of this process may use its store."""
    found = Span()
    ledger = client.store.portal.ledger
    was_close, ledger.is_close = ledger.is_close, True
    try:
        looks, before = look(client), client.stats()
        yield found
        after = client.stats()
        found.looks = between(looks, look(client))
    finally:
        ledger.is_close = was_close
    found.calls = _grown(before, after, lambda stats: stats.count)
    sent: dict[str, tuple[int, float]] = {}
    for kind, stats in after.requests.items():
        was = before.requests.get(kind)
        count = stats.count - (was.count if was is not None else 0)
        if kind not in QUESTIONS and count:
            sent[kind] = (count, stats.total_s - (was.total_s if was is not None else 0.0))
    found.shares = attribute(
        total_s=_grown(before, after, lambda stats: stats.total_s),
        servers_s=_grown(before, after, lambda stats: stats.servers_s),
        disk_s=_grown(before, after, lambda stats: stats.disk_s),
        sent=sent,
        looks=found.looks,
    )


def _grown(before: ClientStats, after: ClientStats, value: Callable[[OperationStats], float]) -> Any:
    return sum(map(value, after.operations.values())) - sum(map(value, before.operations.values()))


def attribute(
    *, total_s: float, servers_s: float, disk_s: float, sent: Mapping[str, tuple[int, float]], looks: Sequence[Look]
) -> Shares:
    """Split what calls took. `sent`: kinds of request that they were made of, how many, and the seconds of all."""
    entry, behind = _stages(looks, sent)
    # Servers that wait for others do so for what those did, as far as that goes; the rest is the network between them.
    fits = min(entry["servers"] / inner, 1.0) if (inner := sum(behind.values())) else 0.0
    inside = {name: entry[name] + fits * behind[name] for name in behind}
    known_s = sum(inside.values())
    # Requests of one call may be under way side by side: then they took longer together than the call waited.
    sent_s = max(sum(seconds for _, seconds in sent.values()), known_s, servers_s)
    scale = servers_s / sent_s if sent_s else 0.0
    return Shares(
        client=total_s - servers_s - disk_s,
        network=servers_s - scale * known_s,
        queue=scale * inside["queue"],
        disk=disk_s + scale * inside["disk"],
        work=scale * inside["work"],
    )


def _stages(looks: Sequence[Look], sent: Mapping[str, tuple[int, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by stage: of requests like those that were sent, as many; and of the requests behind them."""
    kinds: dict[str, KindStats] = {}
    for each in looks:
        for kind, stats in each.kinds.items():
            kinds.setdefault(kind, KindStats()).merge(stats)
    entry = dict.fromkeys(STAGES, 0.0)
    behind = dict.fromkeys(("queue", "disk", "work"), 0.0)
    ours = everybodys = 0
    for kind, stats in kinds.items():
        count = stats.whole.count
        if kind in sent:
            mine = min(sent[kind][0], count)
            ours, everybodys = ours + mine, everybodys + count
            for name in entry:
                entry[name] += stats.stage(name).total_s * mine / count
        elif kind in BEHIND:
            for name in behind:
                behind[name] += stats.stage(name).total_s
    if everybodys:
        behind = {name: seconds * ours / everybodys for name, seconds in behind.items()}
    return entry, behind
