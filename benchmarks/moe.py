"""What do experts cost, forward and backward, beside transformers' and a loop over tokens?

All sides get the same tokens, the same chosen experts and the same weights: what is timed is dispatch, experts and
combination, without the router. The loop is the one of the articles that this project began from: per token and choice
a Python list, experts of two matrices and GELU, so it has two thirds of our weights. The ceiling is our products alone,
as if all tokens went to one expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .runner import Row, compare

PEERS_GOAL = 1.1
LOOP = "seeds' loop"
EAGER = "eager"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A layer and its batch."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    loop_goal: float
    """How many times faster than the loop a forward pass in fp32 is to be."""

    def __str__(self) -> str:
        return f"T{self.tokens} h{self.hidden} i{self.inner} E{self.experts} k{self.top_k}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How long."""

    rounds: int
    repeats: int
    """Passes of a layer that are timed as one."""


FULL = Size(rounds=25, repeats=5)
QUICK = Size(rounds=1, repeats=2)
SHAPES = (
    Shape(tokens=1024, hidden=256, inner=128, experts=32, top_k=4, loop_goal=7.0),
    Shape(tokens=512, hidden=512, inner=256, experts=64, top_k=6, loop_goal=3.0),
)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    # Torch and transformers take seconds to import, which other benchmarks need not wait for.
    from .moe_sides import Sides

    rows = []
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16"):
            sides = Sides(shape, dtype)
            for backward in (False, True):
                with_loop = dtype == "float32" and not backward
                rows += _compared(shape, dtype, sides, backward, with_loop, size)
    return rows


def _compared(shape: Shape, dtype: str, sides: object, backward: bool, with_loop: bool, size: Size) -> list[Row]:
    from .moe_sides import Sides

    assert isinstance(sides, Sides)
    peers = {name: sides.subject(name, backward, _repeats(name, backward, size)) for name in sides.peers}
    if with_loop:
        peers[LOOP] = sides.loop()
    row = compare(
        f"{shape}, {dtype}, forward{' and backward' if backward else ''}: tokens/s",
        sides.subject("ours", backward, size.repeats),
        peers=peers,
        ceiling=sides.ceiling(backward, size.repeats),
        rounds=size.rounds,
    )
    best = min(sides.peers, key=row.against)
    rows = [replace(row, baseline=best, ratio=row.against(best), goal=PEERS_GOAL)]
    if with_loop:
        name = row.row.replace(": tokens/s", ", against the loop: tokens/s")
        rows.append(replace(row, row=name, baseline=LOOP, ratio=row.against(LOOP), goal=shape.loop_goal))
    return rows


def _repeats(peer: str, backward: bool, size: Size) -> int:
    # The eager experts fill a gradient of all experts' size for each expert: seconds a pass, where others take tenths.
    return 1 if peer == EAGER and backward else size.repeats
