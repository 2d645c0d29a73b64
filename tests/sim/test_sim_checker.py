"""The linearizability checker: histories that are known good and known bad, and what a real register does.

Run: pytest tests/sim/test_sim_checker.py
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from emberfs.testing.sim.checker import (
    Call,
    History,
    Operation,
    Outcome,
    Read,
    Remove,
    Replace,
    Truncate,
    Write,
    check,
    failures,
)

ALL = Read(0, 100)
DONE, NOTHING, UNKNOWN = Outcome.DONE, Outcome.NOTHING, Outcome.UNKNOWN
A, B, C = b"aaaa", b"bbbb", b"cccc"

Line = tuple[int, int | None, Operation, Any]
"""(begin, end, operation, what a read got or the outcome)"""


def history(*lines: Line) -> list[Call]:
    calls = []
    for begin, end, operation, result in lines:
        outcome = result if isinstance(result, Outcome) else DONE
        got = result if isinstance(result, bytes) else b""
        calls.append(Call(b"k", operation, "", begin, begin, end, end, outcome, got))
    return calls


GOOD: dict[str, list[Call]] = {
    "nothing": history(),
    "absent reads as nothing": history((1, 2, ALL, b"")),
    "one after the other": history((1, 2, Replace(A), DONE), (3, 4, ALL, A), (5, 6, Replace(B), DONE), (7, 8, ALL, B)),
    "a read beside a write may see it": history((1, 4, Replace(A), DONE), (2, 3, ALL, A)),
    "or not": history((1, 4, Replace(A), DONE), (2, 3, ALL, b"")),
    "writes side by side go in either order": history(
        (1, 5, Replace(A), DONE), (2, 4, Replace(B), DONE), (6, 7, ALL, A), (8, 9, ALL, A)
    ),
    "unknown, and it never happened": history((1, 2, Replace(A), UNKNOWN), (3, 4, ALL, b"")),
    "unknown, and it happened late": history(
        (1, 2, Replace(A), UNKNOWN), (3, 4, ALL, b""), (5, 6, Replace(B), DONE), (7, 8, ALL, B), (9, 10, ALL, A)
    ),
    "unknown, happened and was overwritten unseen": history(
        (1, 2, Write(4, B), UNKNOWN), (3, 4, Write(0, A), DONE), (5, 6, ALL, A + B)
    ),
    "an unknown gap shows as zeros": history(
        (1, 2, Write(6, B), UNKNOWN), (3, 4, Write(6, A), DONE), (5, 6, ALL, bytes(6) + A)
    ),
    "unknown removal": history((1, 2, Replace(A), DONE), (3, 4, Remove(), UNKNOWN), (5, 6, ALL, A), (7, 8, ALL, b"")),
    "a call that never ended": history((1, None, Replace(A), UNKNOWN), (2, 3, ALL, A)),
    "parts": history((1, 2, Replace(A), DONE), (3, 4, Write(2, B), DONE), (5, 6, ALL, b"aabbbb")),
    "a read of a part": history((1, 2, Replace(A + B), DONE), (3, 4, Read(3, 2), b"ab"), (5, 6, Read(8, 2), b"")),
    "truncate keeps the beginning": history((1, 2, Replace(A), DONE), (3, 4, Truncate(2), DONE), (5, 6, ALL, b"aa")),
    "truncate never extends": history((1, 2, Replace(A), DONE), (3, 4, Truncate(9), DONE), (5, 6, ALL, A)),
    "refused means nothing happened": history((1, 2, Replace(A), NOTHING), (3, 4, ALL, b"")),
    "a read without an answer says nothing": history((1, 2, Replace(A), DONE), (3, 4, ALL, UNKNOWN)),
    # Herlihy and Wing's own example of a queue has its like here: the later begin takes effect first.
    "crossed reads": history(
        (1, 10, Replace(A), DONE), (2, 11, Replace(B), DONE), (3, 4, ALL, B), (5, 12, ALL, A), (13, 14, ALL, A)
    ),
}

BAD: dict[str, list[Call]] = {
    "a lost write": history((1, 2, Replace(A), DONE), (3, 4, ALL, b"")),
    "a stale read": history((1, 2, Replace(A), DONE), (3, 4, Replace(B), DONE), (5, 6, ALL, A)),
    "a read from nowhere": history((1, 2, Replace(A), DONE), (3, 4, ALL, C)),
    "a read before the write": history((1, 2, ALL, A), (3, 4, Replace(A), DONE)),
    "new, then old again": history((1, 6, Replace(A), DONE), (2, 3, ALL, A), (4, 5, ALL, b"")),
    "two readers see different orders": history(
        (1, 20, Replace(A), DONE), (2, 21, Replace(B), DONE), (3, 4, ALL, A), (5, 6, ALL, B), (7, 8, ALL, A)
    ),
    "applied twice": history(
        (1, 2, Replace(A), DONE), (3, 4, Replace(B), DONE), (5, 6, ALL, B), (7, 8, ALL, A), (9, 10, ALL, A)
    ),
    "unknown, seen and gone": history((1, 2, Replace(A), UNKNOWN), (3, 4, ALL, A), (5, 6, ALL, b"")),
    "refused, and it happened": history((1, 2, Replace(A), NOTHING), (3, 4, ALL, A)),
    "resurrected": history((1, 2, Replace(A), DONE), (3, 4, Remove(), DONE), (5, 6, ALL, A)),
    "half a write": history((1, 2, Replace(A + B), DONE), (3, 4, ALL, A)),
    "torn": history((1, 6, Replace(A + A), DONE), (2, 5, Replace(B + B), DONE), (7, 8, ALL, A + B)),
    "a gap that is not zeros": history((1, 2, Write(2, A), DONE), (3, 4, ALL, b"xx" + A)),
    "a truncate undone": history((1, 2, Replace(A), DONE), (3, 4, Truncate(2), DONE), (5, 6, ALL, A)),
    "a partial write over the wrong content": history(
        (1, 2, Replace(A), DONE), (3, 4, Replace(B), DONE), (5, 6, Write(0, b"x"), DONE), (7, 8, ALL, b"xaaa")
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_histories_pass(name: str) -> None:
    assert check(GOOD[name]) is None


@pytest.mark.parametrize("name", BAD)
def test_bad_histories_are_found(name: str) -> None:
    assert "no order fits" in (check(BAD[name]) or "")


def random_history(rng: random.Random, *, calls: int, clients: int, unknown: float) -> History:
    """What clients see of a register that really is one."""
    made = History()
    value = b""
    running: list[tuple[Call, float]] = []
    applied: dict[int, tuple[bool, bytes]] = {}
    late: list[Call] = []
    begun = 0
    while begun < calls or running:
        if begun < calls and ((len(running) < clients and rng.random() < 0.5) or not running):
            payload = rng.randbytes(8)
            operation: Operation = rng.choice(
                [Replace(payload), Write(rng.randrange(12), payload), Truncate(rng.randrange(16)), Remove(), ALL, ALL]
            )
            running.append((made.begin(b"k", operation), rng.random()))
            begun += 1
            continue
        call, fate = running.pop(rng.randrange(len(running)))
        if id(call) not in applied:
            applies = fate > unknown / 2
            if applies and fate < unknown:
                late.append(call)
            elif applies:
                applied[id(call)] = (True, value[0:100])
                value = call.operation.apply(value) if not isinstance(call.operation, Read) else value
                running.append((call, fate))
                continue
            made.end(call, UNKNOWN)
        else:
            made.end(call, DONE, applied[id(call)][1] if isinstance(call.operation, Read) else b"")
        if late and rng.random() < 0.3:
            operation = late.pop().operation
            value = operation.apply(value) if not isinstance(operation, Read) else value
    return made


@pytest.mark.parametrize("seed", range(40))
def test_a_real_register_passes(seed: int) -> None:
    made = random_history(random.Random(seed), calls=120, clients=5, unknown=0.15)
    assert list(failures(made)) == []


def test_a_register_that_lies_once_is_found() -> None:
    found = 0
    for seed in range(20):
        rng = random.Random(seed)
        made = random_history(rng, calls=80, clients=4, unknown=0.05)
        reads = [call for call in made.calls if isinstance(call.operation, Read) and call.outcome is DONE and call.got]
        liar = rng.choice(reads)
        others = [call.got for call in reads if call.got != liar.got and call.begun < liar.begun - 40]
        liar.got = rng.choice(others) if others else b"never written"
        found += any(True for _ in failures(made))
    assert found >= 18, "an old value may have been a legal one, seldom"


def test_chunks_are_judged_apart() -> None:
    made = History()
    for chunk, got in ((b"good", A), (b"bad", B)):
        write = made.begin(chunk, Replace(A))
        made.end(write, DONE)
        read = made.begin(chunk, ALL)
        made.end(read, DONE, got)
    assert [chunk for chunk, _ in failures(made)] == [b"bad"]
