"""From nothing to the first result, where the data is next to nothing: what it costs that there is an engine at all."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from ..process import Cost, Job, cost_row, cpu_s, interleave
from ..runner import OURS, Row, verify
from .sides import DUCKDB, SMALLPOND, automatic, command, our_job, those_set_up

if TYPE_CHECKING:
    from .rows import Size

RESULT_GOAL_S = 0.2
ABOVE_DUCKDB_GOAL_S = 0.3
# The table and the query of smallpond's own first example.
TICKERS = ["AAPL", "GOOG", "AAPL", "MSFT", "GOOG", "AAPL", "MSFT", "NVDA"]
PRICES = [3, 5, 4, 1, 9, 7, 2, 6]
QUERY = "SELECT ticker, min(price), max(price) FROM rows GROUP BY ticker"


def rows(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    path, root = directory / "prices.parquet", directory / "smallpond-root"
    pq.write_table(pa.table({"ticker": TICKERS, "price": PRICES}), path)
    given = {"inputs": [str(path)], "text": QUERY}
    store = directory / "store"
    jobs = {
        OURS: our_job("first_result", automatic(store), store, **given),
        DUCKDB: Job(command=command(DUCKDB, "first_result", **given)),
    }
    costs = interleave(jobs, size.startup_rounds)
    for peer in those_set_up([SMALLPOND] if size.has_goals else []):
        job = Job(command=command(peer, "first_result", data_root=str(root), **given), outputs=[root])
        costs |= interleave({peer: job}, 1)
    for name, found in costs.items():
        verify(all(cost.told["rows"] == len(set(TICKERS)) for cost in found), f"{name}: wrong rows")
    above_s = [ours.wall_s - other.wall_s for ours, other in zip(costs[OURS], costs[DUCKDB], strict=True)]
    peers = [DUCKDB, SMALLPOND]
    return [
        cost_row("init to first result on 8 rows, s", _to_result_s, costs, peers=peers, goal=RESULT_GOAL_S),
        Row(
            row="whole process above plain DuckDB's, s",
            ours=statistics.median(above_s),
            goal=ABOVE_DUCKDB_GOAL_S,
            at_most=True,
        ),
        cost_row("first result on 8 rows, whole process, CPU s", cpu_s, costs, peers=peers),
    ]


def _to_result_s(cost: Cost) -> float:
    return cost.told["init_to_result_s"]
