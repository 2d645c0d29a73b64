"""Cyclic difference families: few base blocks that, shifted around a circle of hosts, meet every pair equally often.

Hosts are the numbers mod n. A base block of k numbers, shifted by 0, 1, … n-1, is n chains in which every host is k
times; two hosts that differ by d are together as often as d is a difference within the base blocks. So the whole design
is balanced when the base blocks are, and those are few: 32 for 200 hosts of 96 targets in chains of 3. See the Handbook
of Combinatorial Designs (Colbourn and Dinitz, 2nd ed., 2007), VI.16 "Difference families"; residues mod `racks` that
differ make it the group divisible variant (IV.4).

The base blocks are found as Stinson finds Steiner triple systems ("Hill-climbing algorithms for the construction of
combinatorial designs", 1985), on differences in the place of pairs: put in a block that is made of differences with
room left, put out one that is in its way.

Invariants: the same arguments give the same family. Does not know: disks, or what to do when there is no family.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..striping import splitmix64

Block = tuple[int, ...]


class Draws:
    """A row of numbers that looks random and is the same each time."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, limit: int) -> int:
        """The next number of 0..limit-1."""
        self._state, random = splitmix64(self._state)
        return random * limit >> 64

    def shuffle(self, items: list[int]) -> None:
        for index in range(len(items) - 1, 0, -1):
            other = self.below(index + 1)
            items[index], items[other] = items[other], items[index]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a family is to be."""

    hosts: int
    """Host i is in rack i mod `racks`."""
    replicas: int
    """Numbers in a block, at most `hosts`."""
    blocks: int
    load_max: int
    """How often a difference may occur: the most chains that two hosts share."""
    racks: int = 1
    """Divides `hosts`."""
    rack_limit: int = 1 << 30
    """How many of a block may be in one rack."""


def find_family(shape: Shape, *, steps_max: int) -> list[Block] | None:
    """The base blocks of a family, or None if `steps_max` blocks were tried and none was found."""
    if shape.replicas == 1:
        return [(0,)] * shape.blocks
    search = _Search(shape)
    for _ in range(steps_max):
        if len(search.blocks) == shape.blocks:
            return search.blocks
        search.step()
    return None


class _Search:
    """Blocks whose differences have room, on the way to enough of them."""

    def __init__(self, shape: Shape) -> None:
        self.blocks: list[Block] = []
        self._shape = shape
        self._room = [shape.load_max] * shape.hosts
        """Per difference; never negative between steps."""
        self._draws = Draws(shape.hosts << 40 | shape.blocks << 20 | shape.replicas << 8 | shape.racks)

    def step(self) -> None:
        """Put a block in, or change nothing, then put out those that are in its way: one, seldom two."""
        block = self._draw()
        if block is None:
            return
        self._use(block, 1)
        over = [difference for difference in _differences(block, self._shape.hosts) if self._room[difference] < 0]
        out: list[Block] = []
        while over:
            users = [each for each in self.blocks if each not in out and self._uses(each, over[0])]
            if not users:
                break
            out.append(users[self._draws.below(len(users))])
            self._use(out[-1], -1)
            over = [difference for difference in over if self._room[difference] < 0]
        if over or len(out) > 1 + (self._draws.below(32) == 0):
            self._use(block, -1)
            for each in out:
                self._use(each, 1)
            return
        for each in out:
            self.blocks.remove(each)
        self.blocks.append(block)

    def _draw(self) -> Block | None:
        """A block with 0 that takes differences with room, as far as that can be."""
        hosts, draws = self._shape.hosts, self._draws
        free = [difference for difference in range(1, hosts) if self._room[difference] > 0]
        draws.shuffle(free)
        block = [0]
        while len(block) < self._shape.replicas:
            best, fewest = None, 1 << 30
            for number in free:
                if number in block or not self._rack_allows(block, number):
                    continue
                conflicts = sum(self._room[(number - other) % hosts] <= 0 for other in block)
                if conflicts < fewest:
                    best, fewest = number, conflicts
                    if not conflicts:
                        break
            if best is None:
                return None
            block.append(best)
        return tuple(block)

    def _rack_allows(self, block: list[int], number: int) -> bool:
        racks = self._shape.racks
        return sum((other - number) % racks == 0 for other in block) < self._shape.rack_limit

    def _uses(self, block: Block, difference: int) -> bool:
        return difference in _differences(block, self._shape.hosts)

    def _use(self, block: Block, sign: int) -> None:
        for difference in _differences(block, self._shape.hosts):
            self._room[difference] -= sign


def _differences(block: Block, hosts: int) -> list[int]:
    """Of each ordered pair: hosts that differ by half the circle count twice, as they meet twice in a round."""
    return [(one - other) % hosts for one in block for other in block if one != other]
