"""What planning may ask of a session, at one moment: files, columns, and rows that are here already.

Everything that one call of the user's runs is planned with one of these, so that now() is the same in all of it.

Does not know: how jobs run (`jobs.py`).
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from .plan.conditions import conditions_of
from .plan.filescans import ResolvedScan
from .plan.frames import Computed, Frame
from .plan.nodes import Column, Expr
from .plan.resolving import listed, resolve, with_partitions
from .plan.scantext import FileScan
from .plan.skipping import narrowed
from .query import quoted

if TYPE_CHECKING:
    from .jobs import Jobs

_NARROWED_MAX = 64


@dataclass(frozen=True, slots=True)
class SessionCatalog:
    """What the planner knows a session by."""

    jobs: Jobs
    now: datetime.datetime

    def resolve(self, scan: FileScan) -> ResolvedScan:
        """The scan's files and columns, as they are now: one job sees one state of them. Files that are as they were
        are not looked into again."""
        jobs = self.jobs
        files = listed(scan, jobs.config.storage_options)
        known = jobs.scans.get(scan)
        if known is None or known[0] != files or not all(file.version for file in files):
            with jobs.session.engine.running(scan.call(scan.paths)) as cursor:
                resolved = resolve(scan, files, jobs.footers, cursor)
                known = jobs.scans[scan] = files, with_partitions(resolved, jobs.config.storage_options)
        return known[1]

    def narrowed(self, scan: ResolvedScan, exprs: tuple[Expr, ...]) -> ResolvedScan:
        """The scan of the files that may hold rows for which all of `exprs`, over its columns, are true; the answers
        that were used last are kept."""
        if scan.is_whole:
            return scan
        conditions = tuple(condition for expr in exprs for condition in conditions_of(expr, scan.columns))
        key = scan.scan, scan.files, conditions
        known = self.jobs.narrowed
        found = known.pop(key, None)
        if found is None or not all(file.version for file in scan.files):
            with self.jobs.session.engine.running(scan.scan.call(scan.scan.paths)) as cursor:
                found = narrowed(scan, conditions, self.jobs.footers, cursor)
        known[key] = found
        for oldest in list(known)[:-_NARROWED_MAX]:
            known.pop(oldest, None)
        return found

    def computed(self, frame: Frame) -> Computed | None:
        """The frame's rows, if an earlier job has made them."""
        return self.jobs.computed(frame)

    def compute(self, frame: Frame) -> Computed:
        """The frame's rows, which a job of the same moment makes."""
        return self.jobs.compute(frame, now=self.now)

    def describe(self, text: str, shadows: Mapping[str, Sequence[Column]]) -> tuple[Column, ...]:
        """The columns of a query over tables with these columns. Raises `QueryError` for one that DuckDB refuses."""
        with self.jobs.session.engine.running(text) as cursor:
            for name, columns in shadows.items():
                listed = ", ".join(f"{quoted(column.name)} {column.type}" for column in columns)
                cursor.execute(f"CREATE OR REPLACE TEMP TABLE {quoted(name)} ({listed})")
            rows = cursor.execute(f"DESCRIBE {text}").fetchall()
        return tuple(Column(str(row[0]), str(row[1])) for row in rows)

    def columns_of(self, table: pa.Table) -> tuple[Column, ...]:
        """A table's columns, as DuckDB has them."""
        with self.jobs.session.engine.running("") as cursor:
            cursor.register("emberflow_shape", pa.Table.from_batches([], table.schema))
            rows = cursor.execute("DESCRIBE emberflow_shape").fetchall()
        return tuple(Column(str(row[0]), str(row[1])) for row in rows)
