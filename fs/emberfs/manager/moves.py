"""Which chains begin to move now: off nodes that drain, then to nodes that join; a few at a time. Pure functions.

`placement_moves` chooses; here is what of it may begin as the chains stand, which is asked again whenever they change.
A move adds a target on another node and marks the old one leaving; the chain keeps its replicas meanwhile. If a target
of the chain is still leaving that node, it stays instead: a node has one target of a chain at a time.

Invariants: targets move only to living nodes. A chain that moves begins no other move, unless the node that a target
moves to is drained before it serves: the first move could not end.

Does not know: states beyond whether a target serves, rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from ..routing import Chain, ChainTarget, Role, Target, TargetState
from .chains import DiskSlot, host_of, staying
from .placement_moves import Shift, apply_shifts, shifts_to_empty, shifts_to_fill
from .rows import NodeRow


@dataclass(frozen=True, slots=True)
class Move:
    """`target` of `chain` is to leave, for one on node `to`."""

    chain: int
    target: bytes
    to: str
    stays: bytes | None = None
    """The one that is leaving `to`, and now does not."""


class Layout:
    """Who holds what, and who may take and give."""

    def __init__(
        self,
        chains: Mapping[int, Chain],
        targets: Mapping[bytes, Target],
        nodes: Mapping[str, NodeRow],
        *,
        alive: Collection[str],
        same_host: bool,
    ) -> None:
        self.moving = {chain.id for chain in chains.values() if any(each.leaving for each in chain.targets)}
        # Those that move first: one that needs another move must not wait behind others for the limit.
        self.chains = sorted(chains.values(), key=lambda chain: (chain.id not in self.moving, chain.id))
        slots = {
            name: DiskSlot(name, host_of(row.node, same_host=same_host), row.node.rack)
            for name, row in nodes.items()
            if row.node.role == Role.STORAGE
        }
        self._node_of = {target.id: target.node for target in targets.values()}
        self.groups = [
            # Those that do not serve first, for the same reason.
            tuple(slots[self._node_of[each.target]] for each in sorted(staying(chain), key=lambda each: -each.state))
            for chain in self.chains
        ]
        members = {name: row for name, row in nodes.items() if row.member and not row.node.draining}
        self.disks = [slots[name] for name in sorted(members)]
        self.dead = set(members) - set(alive)
        self.joining = {name for name, row in members.items() if row.joining and name in alive}
        """Only the living."""
        self.draining = {disk.node for group in self.groups for disk in group if nodes[disk.node].node.draining}
        """Only those with targets that stay."""

    def target_on(self, chain: Chain, node: str) -> ChainTarget | None:
        """The target that stays there."""
        return next((each for each in staying(chain) if self._node_of[each.target] == node), None)

    def leaving(self, chain: Chain, node: str) -> ChainTarget | None:
        """The target that leaves it."""
        return next((each for each in chain.targets if each.leaving and self._node_of[each.target] == node), None)

    def may_begin(self, chain: Chain, node: str) -> bool:
        """True if the target of `chain` on `node` may begin to move."""
        if chain.id not in self.moving:
            return True
        target = self.target_on(chain, node)
        return node in self.draining and target is not None and target.state != TargetState.SERVING

    def shifts(self) -> Iterator[Shift]:
        """All that is to move, on the groups: first what must, then what should."""
        emptied = []
        if self.draining:
            for shift in shifts_to_empty(self.groups, self.disks, self.dead):
                emptied.append(shift)
                yield shift
        if self.joining:
            yield from shifts_to_fill(apply_shifts(self.groups, emptied), self.disks, self.joining)


def plan_moves(layout: Layout, *, limit: int) -> tuple[list[Move], bool]:
    """(the moves to begin now, so that at most `limit` chains move; whether nothing is left to begin later)."""
    moving = set(layout.moving)
    moves: list[Move] = []
    begun: set[int] = set()
    is_all = True
    for shift in layout.shifts() if len(moving) < limit or _has_stuck(layout) else ():
        chain = layout.chains[shift.chain]
        if chain.id not in moving and len(moving) >= limit:
            return moves, False
        if chain.id in begun or not layout.may_begin(chain, shift.leaves.node):
            is_all = False
            continue
        target = layout.target_on(chain, shift.leaves.node)
        assert target is not None, "a chain that does not move is as the plan has it"
        leaving = layout.leaving(chain, shift.comes.node)
        if leaving is not None and leaving.state == TargetState.OFFLINE:
            is_all = False  # It may have stopped for good, until its node is started again.
            continue
        stays = leaving.target if leaving is not None else None
        moves.append(Move(chain.id, target.target, shift.comes.node, stays))
        begun.add(chain.id)
        moving.add(chain.id)
    return moves, is_all and len(moving) < limit


def _has_stuck(layout: Layout) -> bool:
    """True if a chain that moves may begin another move."""
    return any(
        layout.may_begin(chain, disk.node)
        for chain, group in zip(layout.chains, layout.groups, strict=True)
        if chain.id in layout.moving
        for disk in group
    )
