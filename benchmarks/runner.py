"""Rows: how a comparison is timed, judged and printed.

Invariants:
  - What is compared runs in turn, round by round, and begins each round with another one: a machine that gets slower
    meanwhile gets slower for all.
  - A ratio is the median of the ratios of the rounds, so both sides of each ratio were measured next to each other.
  - Every subject runs once before the rounds and verifies each result there; the timed rounds verify what is cheap.

Does not know: stores, files, or which benchmarks there are.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "ours"

Subject = Callable[[bool], float]
"""One pass over the work; returns how much it was, in the row's unit. True: verify every result (raise WrongResult)."""


class WrongResult(Exception):
    """A subject returned something else than what was stored."""


def verify(true: bool, what: str) -> None:
    """Raise WrongResult unless `true`. Unlike `assert` it is there under -O too."""
    if not true:
        raise WrongResult(what)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """What one pass took: medians over the rounds."""

    wall: float
    cpu: float
    """User and system time of all threads of this process; I/O that the kernel does later is not in it."""
    servers: float | None = None
    """The same of the processes that served it."""
    amount: float = 0.0
    """What was done in that time, in the row's unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    row: str
    """What is measured, with its unit."""
    ours: float
    peers: dict[str, float] = field(default_factory=dict)
    ceiling: float | None = None
    """What the machine gives without a store: the 100 % line."""
    ratio: float | None = None
    baseline: str | None = None
    """Whose number `ratio` divides ours by: "ceiling" or a peer's name."""
    goal: float | None = None
    """For `ratio` if there is one, else for `ours`. None: the row is for information."""
    at_most: bool = False
    """The goal is an upper bound."""
    seconds: dict[str, Seconds] = field(default_factory=dict)
    rounds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """The number of each round, of ours, the peers and the ceiling: how much they scatter."""

    def against(self, peer: str) -> float:
        """Ours by a peer's: the median of the rounds' own ratios."""
        return statistics.median(mine / his for mine, his in zip(self.rounds[OURS], self.rounds[peer], strict=True))

    @property
    def cpu_per_gib(self) -> float | None:
        """CPU seconds of client and servers together for each GiB, of a row in MiB/s whose servers are known."""
        mine = self.seconds.get(OURS)
        if mine is None or mine.servers is None or not self.row.endswith("MiB/s"):
            return None
        return (mine.cpu + mine.servers) / mine.amount * 1024

    @property
    def met(self) -> bool | None:
        """None without a goal."""
        if self.goal is None:
            return None
        value = self.ours if self.ratio is None else self.ratio
        return value <= self.goal if self.at_most else value >= self.goal

    def as_object(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self) | {"met": self.met, "cpu_per_gib": self.cpu_per_gib}


@dataclass(frozen=True, slots=True)
class _Pass:
    amount: float
    wall_s: float
    cpu_s: float
    servers_s: float | None

    @property
    def rate(self) -> float:
        return self.amount / self.wall_s


def compare(
    row: str,
    ours: Subject,
    *,
    peers: Mapping[str, Subject] | None = None,
    ceiling: Subject | None = None,
    baseline: str | None = None,
    goal: float | None = None,
    rounds: int,
    servers: Mapping[str, Sequence[int]] | None = None,
    between: Callable[[], None] = lambda: None,
) -> Row:
    """Time `ours` beside the others; rates are amount per wall second. `baseline` as in Row.

    `servers`: the processes that serve a subject, whose CPU time is told beside its own. `between` is done before each
    timed pass, and not timed. Raises WrongResult.
    """
    subjects = {OURS: ours, **(peers or {})} | ({"ceiling": ceiling} if ceiling is not None else {})
    for subject in subjects.values():
        subject(True)
    passes = _interleave(subjects, rounds, servers or {}, between)
    rounds = {name: tuple(done.rate for done in passes[name]) for name in subjects}
    rates = {name: statistics.median(each) for name, each in rounds.items()}
    found = Row(
        row=row,
        ours=rates[OURS],
        peers={name: rates[name] for name in peers or {}},
        ceiling=rates.get("ceiling"),
        baseline=baseline,
        goal=goal,
        seconds={name: _median_seconds(done) for name, done in passes.items()},
        rounds=rounds,
    )
    return found if baseline is None else replace(found, ratio=found.against(baseline))


def _interleave(
    subjects: Mapping[str, Subject],
    rounds: int,
    servers: Mapping[str, Sequence[int]],
    between: Callable[[], None],
) -> dict[str, list[_Pass]]:
    passes: dict[str, list[_Pass]] = {name: [] for name in subjects}
    names = list(subjects)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            between()
            gc.collect()  # Nobody pays for another one's garbage.
            pids = servers.get(name)
            servers_s = cpu_s_of(pids) if pids is not None else 0.0
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            amount = subjects[name](False)
            wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
            passes[name].append(_Pass(amount, wall_s, cpu_s, cpu_s_of(pids) - servers_s if pids is not None else None))
    return passes


def _median_seconds(passes: Sequence[_Pass]) -> Seconds:
    # The kernel counts other processes in steps of 10 ms: the mean of many passes says more than their median.
    served = [done.servers_s for done in passes if done.servers_s is not None]
    return Seconds(
        wall=statistics.median(done.wall_s for done in passes),
        cpu=statistics.median(done.cpu_s for done in passes),
        servers=statistics.mean(served) if served else None,
        amount=passes[0].amount,
    )


def cpu_s_of(pids: Sequence[int]) -> float:
    """User and system time of processes, so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


# ---- printing


def summary(name: str, rows: Sequence[Row]) -> str:
    """The last line of a benchmark."""
    verdicts = [row.met for row in rows if row.met is not None]
    return f"{name}: {sum(verdicts)} of {len(verdicts)} goals met"


def print_table(console: Console, name: str, rows: Sequence[Row]) -> None:
    """The rows, one column per peer that any row has."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row.peers))
    table = Table(title=name, title_justify="left")
    table.add_column("row", no_wrap=True)
    for title in ("ours", *peers, "ceiling"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("ratio", "goal", "met", "s (cpu)", "cpu/GiB"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        mine = row.seconds.get(OURS)
        table.add_row(
            row.row,
            _number(row.ours),
            *(_number(row.peers.get(peer)) for peer in peers),
            _number(row.ceiling),
            "" if row.ratio is None else f"{row.ratio:.2f} x {row.baseline}",
            "" if row.goal is None else f"{'<=' if row.at_most else '>='} {row.goal:g}",
            {True: "yes", False: "[bold red]MISSED[/]", None: ""}[row.met],
            _spent(mine),
            _number(row.cpu_per_gib),
        )
    # A table in a log, or in a narrow window, is not cut.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def _spent(seconds: Seconds | None) -> str:
    if seconds is None:
        return ""
    servers = "" if seconds.servers is None else f" + {seconds.servers:.2f}"
    return f"{seconds.wall:.2f} ({seconds.cpu:.2f}{servers})"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
