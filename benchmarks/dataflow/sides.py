"""The sides of a comparison: which interpreter runs whose script, and how our session is set.

Does not know: what is compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..environments import Environment
from ..process import Job
from ..runner import OURS

DUCKDB, POLARS, SMALLPOND, RAY = "DuckDB", "Polars", "smallpond", "Ray Data"
FORCED = "forced"
"""We again, without the plan of a single task."""

SMALLPOND_ENVIRONMENT = Environment(
    name="smallpond", requirements=("smallpond==0.15.0", "duckdb<1.5"), imports="smallpond"
)
# Ray Data opens a local file only where fsspec's HTTP filesystem can be imported, which needs aiohttp.
DATA_ENVIRONMENT = Environment(
    name="data", requirements=("polars>=2", "ray[data]>=2.60", "aiohttp"), imports="ray.data, polars"
)

_JOBS = Path(__file__).with_name("jobs")
_SCRIPTS = {
    OURS: "ours.py",
    DUCKDB: "duckdb_peer.py",
    POLARS: "polars_peer.py",
    SMALLPOND: "smallpond_peer.py",
    RAY: "ray_peer.py",
}
_ENVIRONMENTS = {SMALLPOND: SMALLPOND_ENVIRONMENT, POLARS: DATA_ENVIRONMENT, RAY: DATA_ENVIRONMENT}

FORCED_PARTITIONS = 8


def command(side: str, operation: str, **arguments: Any) -> list[str]:
    """The command that runs an operation of the side's script."""
    environment = _ENVIRONMENTS.get(side)
    python = str(environment.python) if environment else sys.executable
    return [python, "-P", str(_JOBS / _SCRIPTS[side]), operation, json.dumps(arguments)]


def those_set_up(peers: Iterable[str]) -> list[str]:
    """The peers that can run here."""
    return [peer for peer in peers if peer not in _ENVIRONMENTS or _ENVIRONMENTS[peer].is_there()]


def automatic(store: Path) -> dict[str, Any]:
    """Our session as it is by itself; what it keeps between stages is on the store in this directory."""
    return {"data_root": f"ember://{store}/!/jobs"}


def forced(store: Path) -> dict[str, Any]:
    """Our session made to send everything through the exchange."""
    exchanged = {"shuffle": "always", "partitions": FORCED_PARTITIONS, "broadcast_bytes": 0}
    return automatic(store) | {"executor": "local"} | exchanged


def our_job(operation: str, session: dict[str, Any], store: Path, *outputs: Path, **arguments: Any) -> Job:
    """A job of ours; the store begins empty each time."""
    return Job(command=command(OURS, operation, session=session, **arguments), outputs=[store, *outputs])
