"""Local search: chains of an irregular cluster, dealt out anyhow, then exchanged until no two hosts share too many.

A step takes two hosts that share more chains than they should, and exchanges one of them for a member of another chain
if that does not make things worse. Steps that change nothing are taken too: they lead away from dead ends.

Invariants: a host keeps its number of targets; a chain has no host twice, nor a rack more often than the limit. The
same arguments give the same chains. Does not know: disks, or where the caps come from.
"""

from __future__ import annotations

from collections.abc import Sequence

from .placement_families import Draws

TRIES = 40
"""Exchanges tried for a pair before another pair has its turn."""


def deal(quotas: Sequence[int], racks: Sequence[int], replicas: int) -> list[list[int]]:
    """Chains in which host `i` is `quotas[i]` times, never twice in one; a rack as seldom as that can be.

    The slots, sorted by rack and host, are laid in columns of one per chain: what is at most a column long meets no
    chain twice. Needs `replicas` x chains quotas in all, and no quota larger than the number of chains.
    """
    order = sorted(range(len(quotas)), key=lambda host: racks[host])
    slots = [host for host in order for _ in range(quotas[host])]
    chains = len(slots) // replicas
    assert len(slots) == chains * replicas
    assert max(quotas, default=0) <= chains
    return [slots[chain::chains] for chain in range(chains)]


class Spread:
    """Chains, and how many of them each two hosts share."""

    def __init__(
        self,
        chains: list[list[int]],
        *,
        caps: Sequence[Sequence[int]],
        racks: Sequence[int],
        rack_limit: int,
    ) -> None:
        """`caps[a][b]`: how many chains a and b should share at most; symmetric."""
        self.chains = chains
        self._caps = caps
        self._racks = racks
        self._rack_limit = rack_limit
        self._loads = [[0] * len(racks) for _ in racks]
        self._held: list[set[int]] = [set() for _ in racks]
        """Per host, its chains."""
        self._draws = Draws(len(chains) << 20 | len(racks))
        for number, chain in enumerate(chains):
            for host in chain:
                self._join(host, [other for other in chain if other < host])
                self._held[host].add(number)

    def shuffle(self, first: int) -> None:
        """Exchange at random among the chains from `first` on."""
        count = len(self.chains) - first
        for one in range(first, len(self.chains)):
            for place in range(len(self.chains[one])):
                other = first + self._draws.below(count)
                self._exchange(one, place, other, self._draws.below(len(self.chains[other])))

    def improve(self, *, steps_max: int) -> bool:
        """Exchange until no cap is exceeded: True then, False if `steps_max` exchanges were tried."""
        steps = 0
        while over := self._over():
            self._draws.shuffle(over)
            for pair in over:
                if steps >= steps_max:
                    return False
                steps += self._relieve(*divmod(pair, len(self._racks)))
        return True

    def allow_more(self) -> None:
        """Raise every cap by one."""
        self._caps = [[cap + 1 for cap in caps] for caps in self._caps]

    def _over(self) -> list[int]:
        """The pairs (a, b), a < b, over their cap, each as one number."""
        hosts = len(self._racks)
        return [
            one * hosts + other
            for one, (loads, caps) in enumerate(zip(self._loads, self._caps, strict=True))
            for other in range(one + 1, hosts)
            if loads[other] > caps[other]
        ]

    def _relieve(self, one: int, other: int) -> int:
        """Try to take one of the two out of a chain that they share. Returns the tries."""
        draws = self._draws
        tries = 0
        while tries < TRIES and self._loads[one][other] > self._caps[one][other]:
            tries += 1
            shared = sorted(self._held[one] & self._held[other])
            chain = shared[draws.below(len(shared))]
            leaver = (one, other)[draws.below(2)]
            with_chain = draws.below(len(self.chains))
            with_place = draws.below(len(self.chains[with_chain]))
            place = self.chains[chain].index(leaver)
            change = self._exchange(chain, place, with_chain, with_place)
            if change is not None and change > 0:
                self._exchange(chain, place, with_chain, with_place)
        return tries

    def _exchange(self, one: int, place: int, other: int, other_place: int) -> int | None:
        """Let two members change chains; how much worse it is then. None: that cannot be, nothing has changed."""
        here, there = self.chains[one], self.chains[other]
        leaver, comer = here[place], there[other_place]
        if leaver in there or comer in here:
            return None
        stay, others = here[:place] + here[place + 1 :], there[:other_place] + there[other_place + 1 :]
        if not (self._rack_allows(comer, stay) and self._rack_allows(leaver, others)):
            return None
        change = self._part(leaver, stay) + self._part(comer, others)
        change += self._join(comer, stay) + self._join(leaver, others)
        here[place], there[other_place] = comer, leaver
        self._held[leaver].remove(one)
        self._held[leaver].add(other)
        self._held[comer].remove(other)
        self._held[comer].add(one)
        return change

    def _rack_allows(self, host: int, others: Sequence[int]) -> bool:
        rack = self._racks[host]
        return sum(self._racks[other] == rack for other in others) < self._rack_limit

    def _join(self, host: int, others: Sequence[int]) -> int:
        """Count `host` in a chain with `others`. The cost of a pair is the square of what it has over its cap."""
        loads, caps, change = self._loads[host], self._caps[host], 0
        for other in others:
            over = loads[other] - caps[other]
            loads[other] += 1
            self._loads[other][host] += 1
            if over >= 0:
                change += 2 * over + 1
        return change

    def _part(self, host: int, others: Sequence[int]) -> int:
        loads, caps, change = self._loads[host], self._caps[host], 0
        for other in others:
            over = loads[other] - caps[other]
            loads[other] -= 1
            self._loads[other][host] -= 1
            if over > 0:
                change -= 2 * over - 1
        return change
