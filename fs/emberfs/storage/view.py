"""A chain as one of its targets sees it: its role, its neighbours, and what only holds in this chain version.

A new chain version makes a new `View`; `changed` of the old one is done then, and whoever works under the old one ends.

Does not know: engines.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..routing import Chain, ChainTarget, TargetState
from ..runtime import Runtime
from ..transport.types import Connection, Network
from .forward import Inbound, Link


class View:
    """What `target` is in one version of its chain."""

    def __init__(
        self, runtime: Runtime, network: Network, chain: Chain, target: bytes, *, addresses: Mapping[bytes, str]
    ) -> None:
        self.chain = chain
        self.version = chain.version
        self.changed = runtime.future()
        """Done when there is a newer version."""
        self.settled = runtime.future()
        """Done when nothing is left here that was pending in an older version (a late call may bring some again)."""
        self.brought: dict[bytes, None] = {}
        """Chunks that the predecessor brought, before it said Settled, with an update of an older version."""
        self.synced = False
        """The predecessor has said that we have everything."""
        self.inbound = Inbound(runtime, self.changed)
        self._network = network
        self._addresses = addresses
        writing = chain.writing
        ids = [each.target for each in writing]
        self._place = ids.index(target) if target in ids else None
        self.me: ChainTarget | None = next((each for each in chain.targets if each.target == target), None)
        self.successor: ChainTarget | None = None
        self.link: Link | None = None
        if self._place is not None and self._place + 1 < len(writing):
            self.successor = writing[self._place + 1]
            self.link = Link(
                runtime, self.connection(self.successor.target), chain.id, version=chain.version, changed=self.changed
            )

    @property
    def is_serving(self) -> bool:
        return self.me is not None and self.me.state == TargetState.SERVING

    @property
    def is_syncing(self) -> bool:
        return self.me is not None and self.me.state == TargetState.SYNCING

    @property
    def is_head(self) -> bool:
        return self.is_serving and self._place == 0

    @property
    def is_tail(self) -> bool:
        return self.is_serving and self._place == len(self.chain.serving) - 1

    @property
    def has_syncing_successor(self) -> bool:
        return self.successor is not None and self.successor.state == TargetState.SYNCING

    @property
    def others_serving(self) -> list[ChainTarget]:
        """Tail first: it has the newest committed versions."""
        assert self.me is not None
        return [each for each in reversed(self.chain.serving) if each.target != self.me.target]

    def connection(self, target: bytes) -> Connection:
        """The way to the node of `target`."""
        return self._network.connection(self._addresses[target])
