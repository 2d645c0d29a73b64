"""The servers behind a store, and what each of them has served: for commands that look at where time goes.

Of a cluster these are all servers that the routing names, asked side by side over the connections of a client. Of an
embedded store it is the one that owns it for several processes; a store that this process owns has none.

They are asked by a message and not by their metrics pages: pages may be off, are on addresses that only their servers
know, and are protected by nothing.

Does not know: what is done with the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..client.sync import Client
from ..cluster import ClusterStore
from ..embedded import EmbeddedStore
from ..errors import EmberError
from ..messages import MeterRead, ReadMeter
from ..meter import KindStats
from ..runtime import Runtime
from ..transport.types import Connection
from ..waiting import all_of, call, first_of, stop

PATIENCE_S = 2.0
"""A server that has not answered by then is told of as one that does not."""
QUESTIONS = frozenset({"ReadMeter", "GetRouting", "Attend"})
"""Ours, and those that are answered only when there is news: their times say nothing."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one server has served by now."""

    server: str
    role: str
    """kv, manager, meta or storage; `store` for the server of an embedded one."""
    up_s: float = 0.0
    kinds: Mapping[str, KindStats] = field(default_factory=dict)
    trouble: str = ""
    """Why there are no numbers."""


def look(client: Client) -> list[Look]:
    """Ask every server; by role and name."""
    store = client.store
    if isinstance(store, ClusterStore):
        nodes = sorted(store.routes.routing.nodes, key=lambda node: (node.role, node.name))
        asked: list[tuple[str, str, Connection]] = [
            (node.name, str(node.role), store.network.connection(node.address)) for node in nodes
        ]
    else:
        assert isinstance(store, EmbeddedStore)
        asked = [] if store.services is not None else [("server", "store", store.meta)]
    works = [_ask(store.runtime, *each) for each in asked]
    outcomes = store.portal.run(all_of(store.runtime, works, "meters"))
    return [outcome for outcome in outcomes if isinstance(outcome, Look)]


async def _ask(runtime: Runtime, server: str, role: str, connection: Connection) -> Look:
    task = runtime.spawn(call(connection, ReadMeter()), "meter")
    timer = runtime.timer(PATIENCE_S)
    try:
        await first_of(runtime, task, timer)
        if not task.done():
            await stop(runtime, task)
            return Look(server, role, trouble="does not answer")
        read = task.result()
    except (EmberError, OSError) as error:
        return Look(server, role, trouble=str(error))
    finally:
        timer.cancel()
    assert isinstance(read, MeterRead)
    return Look(server, role, read.up_s, read.kinds)


def between(earlier: Sequence[Look], later: Sequence[Look]) -> list[Look]:
    """What each server served between two looks; `up_s` is the time between. One that began anew: since then."""
    before = {look.server: look for look in earlier if not look.trouble}
    found = []
    for now in later:
        was = before.get(now.server)
        if now.trouble or was is None:
            found.append(Look(now.server, now.role, trouble=now.trouble or "was not there before"))
            continue
        if was.up_s > now.up_s:
            was = Look(now.server, now.role)
        kinds = {kind: stats.since(was.kinds.get(kind, KindStats())) for kind, stats in now.kinds.items()}
        kinds = {kind: stats for kind, stats in sorted(kinds.items()) if stats.whole.count and kind not in QUESTIONS}
        found.append(Look(now.server, now.role, now.up_s - was.up_s, kinds))
    return found


def by_role(looks: Iterable[Look]) -> list[Look]:
    """The servers of a role as one; those that have trouble stay by themselves."""
    found: list[Look] = []
    roles: dict[str, tuple[int, float, dict[str, KindStats]]] = {}
    for each in looks:
        if each.trouble:
            found.append(each)
            continue
        count, up_s, sums = roles.get(each.role, (0, 0.0, {}))
        for kind, stats in each.kinds.items():
            sums.setdefault(kind, KindStats()).merge(stats)
        roles[each.role] = (count + 1, max(up_s, each.up_s), sums)
    for role, (count, up_s, sums) in roles.items():
        found.append(Look(f"{count} {role}", role, up_s, dict(sorted(sums.items()))))
    return found
