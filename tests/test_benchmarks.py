"""The benchmarks as a program: the arithmetic of a row, what is printed, and that a wrong result is never timed.

Run: pytest tests/test_benchmarks.py. The sizes here are the smallest that go through every line; speed decides nothing.
"""

from __future__ import annotations

import inspect
import json
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from embertrain.checkpoint import Checkpoints
from fsspec.implementations.local import LocalFileSystem

from benchmarks import __main__ as command_line
from benchmarks import (
    checkpoint,
    embedded_io,
    environments,
    graysort,
    loader,
    memory,
    memory_probe,
    metadata,
    peers,
    placement,
    runner,
)
from benchmarks.kvcache import table_probe, traces
from benchmarks.runner import Row, Seconds, WrongResult, compare, summary

KIB, MIB = 1 << 10, 1 << 20


# ---- rows


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row(row="no goal", ours=1.0), None),
        (Row(row="ratio reached", ours=10.0, ratio=0.5, baseline="ceiling", goal=0.5), True),
        (Row(row="ratio missed", ours=10.0, ratio=0.49, baseline="ceiling", goal=0.5), False),
        (Row(row="a bound kept", ours=150.0, goal=150.0, at_most=True), True),
        (Row(row="a bound broken", ours=150.1, goal=150.0, at_most=True), False),
    ],
    ids=lambda value: value.row if isinstance(value, Row) else "",
)
def test_a_goal_is_met_by_the_ratio_or_else_by_the_number(row: Row, met: bool | None) -> None:
    assert row.met is met


def test_the_summary_counts_rows_with_goals_only() -> None:
    rows = [Row(row="a", ours=2.0, goal=1.0), Row(row="b", ours=0.5, goal=1.0), Row(row="c", ours=0.0)]
    assert summary("metadata", rows) == "metadata: 1 of 2 goals met"


class Clock:
    """Time that passes only inside subjects."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def process_time(self) -> float:
        return self.now_s / 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(runner, "time", clock)
    return clock


def test_a_ratio_is_the_median_of_the_rounds_and_each_round_is_paired(clock: Clock) -> None:
    order: list[str] = []

    def subject(name: str, passes_s: list[float]) -> runner.Subject:
        left = iter([100.0, *passes_s])  # The first pass verifies and is not timed.

        def one_pass(check: bool) -> float:
            order.append(name + ("!" if check else ""))
            clock.now_s += next(left)
            return 12.0

        return one_pass

    row = compare(
        "items/s",
        subject("ours", [4.0, 8.0, 2.0]),
        peers={"peer": subject("peer", [1.0, 1.0, 1.0])},
        ceiling=subject("ceiling", [2.0, 6.0, 1.5]),
        baseline="ceiling",
        goal=0.7,
        rounds=3,
    )
    assert (row.ours, row.peers, row.ceiling) == (3.0, {"peer": 12.0}, 6.0)
    assert row.ratio == 0.75, "of 2/4, 6/8 and 1.5/2, not 3/6"
    assert row.met
    assert row.against("peer") == 0.25, "of 1/4, 1/8 and 1/2"
    assert row.seconds["ours"] == Seconds(wall=4.0, cpu=2.0, amount=12.0)
    assert order[:3] == ["ours!", "peer!", "ceiling!"]
    assert order[3:] == ["ours", "peer", "ceiling", "peer", "ceiling", "ours", "ceiling", "ours", "peer"]


def test_cpu_of_servers_counts_for_each_gib() -> None:
    def subject(check: bool) -> float:
        return 512.0

    row = compare("reads, MiB/s", subject, rounds=1, servers={"ours": [os.getpid()]})
    seconds = row.seconds["ours"]
    assert seconds.servers is not None
    assert row.cpu_per_gib == 2 * (seconds.cpu + seconds.servers)
    assert compare("reads, MiB/s", subject, rounds=1).cpu_per_gib is None, "nobody said whose servers those are"


# ---- the command line


@pytest.fixture
def two_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Benchmarks `one` and `two` instead of the real ones; returns the directories they were given."""
    given: list[Path] = []

    def run(directory: Path, size: int) -> list[Row]:
        given.append(directory)
        (directory / "data").write_bytes(b"x")
        return [
            Row(
                row=f"size {size}", ours=2.0, peers={"peer": 4.0}, ceiling=8.0, ratio=0.25, baseline="ceiling", goal=0.3
            )
        ]

    module = types.SimpleNamespace(run=run, FULL=100, QUICK=1)
    monkeypatch.setattr(command_line, "BENCHMARKS", {"embedded_io": module, "memory": module})
    monkeypatch.setattr(command_line, "WORK", tmp_path / "work")
    return given


def test_a_missed_goal_is_printed_as_missed(two_rows: list[Path]) -> None:
    result = CliRunner().invoke(command_line.main, ["memory"], catch_exceptions=False)
    assert "MISSED" in result.stdout
    assert "0.25 x ceiling" in result.stdout
    assert result.stdout.splitlines()[-1] == "memory: 0 of 1 goals met"
    assert not two_rows[0].exists(), "the data is removed"


def test_json_is_one_array_of_rows(two_rows: list[Path]) -> None:
    result = CliRunner().invoke(command_line.main, ["all", "--json", "--quick"], catch_exceptions=False)
    rows = json.loads(result.stdout)
    assert [row["benchmark"] for row in rows] == ["embedded_io", "memory"]
    assert {key: rows[0][key] for key in ("row", "ours", "peers", "ceiling", "goal", "met")} == {
        "row": "size 1",
        "ours": 2.0,
        "peers": {"peer": 4.0},
        "ceiling": 8.0,
        "goal": 0.3,
        "met": False,
    }
    assert "memory: 0 of 1 goals met" in result.stderr


def test_keep_leaves_the_data(two_rows: list[Path]) -> None:
    CliRunner().invoke(command_line.main, ["memory", "--keep"], catch_exceptions=False)
    assert (two_rows[0] / "data").exists()


def test_size_is_that_of_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes: list[graysort.Size] = []

    def run(directory: Path, size: graysort.Size) -> list[Row]:
        sizes.append(size)
        return []

    module = types.SimpleNamespace(run=run, FULL=graysort.FULL, QUICK=graysort.QUICK)
    monkeypatch.setattr(command_line, "BENCHMARKS", {"embedded_io": module, "placement": placement})
    monkeypatch.setattr(command_line, "WORK", tmp_path / "work")
    for text in ("1.5GB", "64MiB", "4096"):
        CliRunner().invoke(command_line.main, ["embedded_io", "--size", text], catch_exceptions=False)
    assert [size.data_bytes for size in sizes] == [1_500_000_000, 64 << 20, 4096]
    assert {size.rounds for size in sizes} == {graysort.FULL.rounds}
    assert "no number of bytes" in CliRunner().invoke(command_line.main, ["embedded_io", "--size", "much"]).output
    assert "has no one size" in CliRunner().invoke(command_line.main, ["placement", "--size", "1GB"]).output


def test_setup_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "DISTRIBUTIONS", ("lmdb", "no-such-peer"))
    monkeypatch.setattr(environments.Environment, "set_up", lambda self, say: say(f"{self.name} would be set up"))
    result = CliRunner().invoke(command_line.main, ["--setup"])
    assert "no-such-peer is missing" in result.stdout
    assert "smallpond would be set up" in result.stdout
    assert result.exit_code == 1


# ---- each benchmark, as small as it goes

TINY_IO = embedded_io.Size(
    data_bytes=16 * MIB,
    small_pass_bytes=1 * MIB,
    write_pass_bytes=2 * MIB,
    update_count=3,
    rounds=1,
    has_read_goals=True,
    fsspec_file_bytes=(8 * MIB,),
)
TINY_METADATA = metadata.Size(flat_files=20, tree=(2, 5), creates_in_flight=64, creates=3, changes=3, rounds=1)
TINY_PLACEMENT = placement.Size(regular=(7, 2), larger=(9,), irregular=(8, 4))
TINY_MEMORY = memory.Size(chunks=600, chunk_log2=(16,), stream_bytes=4 * MIB, rounds=1, has_goals=False)


TINY_LOADER = loader.Size(data_bytes=1 * MIB, sequences=(64,), steps=2, rounds=1, has_goals=False)


def test_loader_runs_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "PEERS", ())
    monkeypatch.setattr(loader, "BATCH_TOKENS", 1024)
    rows = loader.run(tmp_path, TINY_LOADER)
    assert [row.row.split(",")[0] for row in rows[:-1]] == ["from a store", "from an embedded store", "from a folder"]
    assert all(row.ours > 0 for row in rows) and rows[-1].met


def test_embedded_io_runs_through(tmp_path: Path) -> None:
    rows = embedded_io.run(tmp_path, TINY_IO)
    assert sum(row.goal is not None for row in rows) == 7
    assert all(row.ours > 0 for row in rows)


def test_metadata_runs_through(tmp_path: Path) -> None:
    rows = metadata.run(tmp_path, TINY_METADATA)
    assert [row.row.split(",")[0] for row in rows][-3:] == ["durable create", "durable rename", "durable unlink"]
    assert all(row.ours > 0 for row in rows)


def test_memory_runs_through(tmp_path: Path) -> None:
    rows = memory.run(tmp_path, TINY_MEMORY)
    assert all(row.ours > 0 for row in rows)
    assert not any(row.goal for row in rows)


def test_placement_runs_through(tmp_path: Path) -> None:
    rows = placement.run(tmp_path, TINY_PLACEMENT)
    loads = [row for row in rows if "worst peer load" in row.row]
    assert len(loads) == 8 and all(row.ours >= row.peers["bound"] > 0 for row in loads)
    drained = [row for row in rows if "drained: targets moved" in row.row]
    assert [row.ours for row in drained] == [row.peers["its own"] for row in drained]


@pytest.mark.skipif(not traces.CONVERSATIONS.exists(), reason="the conversation trace is not in the repository")
def test_kvcache_comes_to_the_numbers_of_the_conversation_trace() -> None:
    rows = traces.trace_rows()
    assert [row.ours for row in rows[:2]] == [36.64, 37.36]
    assert all(row.met for row in rows)


def test_the_index_of_kvcache_is_probed() -> None:
    found = table_probe.probe(10 * table_probe.CHAIN_PAGES)
    assert 0 < found["median_us"] <= found["p99_us"]


@pytest.mark.parametrize("name", command_line.BENCHMARKS)
def test_every_benchmark_has_two_sizes_of_one_kind(name: str) -> None:
    """Those that start clusters are too slow to be run here."""
    module = command_line.BENCHMARKS[name]
    assert type(module.FULL) is type(module.QUICK)
    assert module.FULL != module.QUICK
    assert list(inspect.signature(module.run).parameters) == ["directory", "size"]


# ---- a wrong byte stops a benchmark


def test_a_wrong_read_stops_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_nothing(self: Any, numbers: Any, into: Any) -> None:
        for view in into:
            view[:] = bytes(len(view))

    monkeypatch.setattr(peers.LmdbValues, "read", read_nothing)
    with pytest.raises(WrongResult, match="LMDB: wrong bytes"):
        embedded_io.run(tmp_path, TINY_IO)


def test_a_wrong_length_stops_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalFileSystem, "info", lambda self, path: {"name": path, "size": 99, "type": "file"})
    with pytest.raises(WrongResult, match="info"):
        metadata.run(tmp_path, TINY_METADATA)


def test_a_lost_stream_stops_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(WrongResult, match="wrong bytes in MiB 0"):
        memory_probe.probe_stream("/dev/null", MIB)


# ---- checkpoints


def test_the_smallest_checkpoints_go_through_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = checkpoint.Size(data_bytes=1, rounds=1, steps=1, saves=1, has_goals=True, shapes=((300, 7), (5,), (1,)))
    stagers = []
    save = dcp.async_save

    def seen(*args: Any, **options: Any) -> Any:
        stagers.append(options["async_stager"])
        return save(*args, **options)

    monkeypatch.setattr(dcp, "async_save", seen)
    rows = checkpoint.run(tmp_path, size)
    assert len(stagers) == 2 and stagers[0] is stagers[1], "the peer's staging memory is warm, too"
    assert [row.goal for row in rows] == [0.7, 0.7, 0.2, None]
    assert all(row.ours > 0 for row in rows)
    assert set(rows[0].peers) == {"dcp", "torch.save"}


def test_a_save_that_is_done_at_once_has_a_step_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "saving", False)
    size = checkpoint.Size(data_bytes=1, rounds=1, steps=1, saves=1, has_goals=False, shapes=((1,),))
    with Checkpoints(tmp_path) as ours:
        (row,) = checkpoint._steps(ours, checkpoint.state_of(size), size)
    assert row.ours > 0
