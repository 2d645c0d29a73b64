"""Many seeds over a few processes: who failed, what was covered.

Does not know: what one seed does (see `simulation`), or a terminal.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...routing import LocalState, TargetState
from .simulation import Cells, Report, simulate

CELLS = tuple((state.name.lower(), report.name.lower()) for state in TargetState for report in LocalState)
"""Every cell of the state table."""
IMPOSSIBLE: frozenset[tuple[str, str]] = frozenset((state, "up_to_date") for state in ("lastsrv", "waiting", "offline"))
"""Up to date counts as online unless the target is serving, or is syncing (docs/replication.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How one seed ended."""

    seed: int
    report: Report | None
    failure: str = ""
    """Empty: it passed."""


@dataclass(kw_only=True, slots=True)
class Summary:
    """All seeds together."""

    passed: int = 0
    failed: list[int] = field(default_factory=list)
    operations: int = 0
    virtual_s: float = 0.0
    operations_min: int = 0
    faults_min: int = 0
    virtual_s_min: float = 0.0
    whole_after_s_max: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    cells: Cells = field(default_factory=Counter)

    def add(self, verdict: Verdict) -> None:
        """Count one more seed."""
        report = verdict.report
        if report is None:
            self.failed.append(verdict.seed)
            return
        is_first = not self.passed
        self.passed += 1
        self.operations += report.operations
        self.virtual_s += report.virtual_s
        faults = report.faults.total()
        self.operations_min = report.operations if is_first else min(self.operations_min, report.operations)
        self.faults_min = faults if is_first else min(self.faults_min, faults)
        self.virtual_s_min = report.virtual_s if is_first else min(self.virtual_s_min, report.virtual_s)
        self.whole_after_s_max = max(self.whole_after_s_max, report.whole_after_s)
        self.faults += report.faults
        self.cells += report.cells

    @property
    def missed(self) -> list[tuple[str, str]]:
        """Cells of the state table that no seed came to."""
        return [cell for cell in CELLS if cell not in IMPOSSIBLE and not self.cells[cell]]


def quiet() -> None:
    """Say nothing of what the servers log: it is about faults that we inject."""
    logging.getLogger("emberline").setLevel(logging.CRITICAL)


def judge(seed: int) -> Verdict:
    """Run one seed."""
    try:
        return Verdict(seed=seed, report=simulate(seed))
    except Exception as error:
        lines = traceback.format_exception(error, limit=-8)
        return Verdict(seed=seed, report=None, failure="".join(lines))


def campaign(seeds: Sequence[int], *, processes: int | None = None) -> Iterator[Verdict]:
    """The verdict of each seed, as they come. `processes`: None for one per core."""
    count = min(processes or os.cpu_count() or 1, len(seeds))
    if count <= 1:
        yield from map(judge, seeds)
        return
    # Fresh processes: a fork would inherit the threads and locks of who calls.
    with multiprocessing.get_context("spawn").Pool(count, quiet) as pool:
        yield from pool.imap_unordered(judge, seeds, chunksize=1)
