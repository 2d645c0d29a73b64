"""`emberline bench`: it measures, names limits that add up, checks bytes, and leaves nothing behind.

Run: pytest tests/fs/test_cli_bench.py
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import emberfs
import pytest
from emberfs import Client
from emberfs.cli.attribution import Shares
from emberfs.cli.bench_work import Work
from emberfs.cli.ceilings import Ceilings, Pace, measure_ceilings
from emberfs.cli.limits import limit_of, parts_of
from emberfs.errors import Corruption
from hypothesis import given
from hypothesis import strategies as st

from .cli_run import emberline, emberline_json, start_emberline
from .sharing_run import no_server_left

SECONDS = st.floats(0, 10)
QUICK = ("bench", "--quick", "--seconds", "0.01")
LIMITS = {"disk", "crc", "copy", "cpu", "network", "latency"}
MIB = 1 << 20


@pytest.fixture
def url(store: Path) -> str:
    """A store with a file in it that is not the bench's."""
    with emberfs.connect(f"ember://{store}") as client:
        client.put("/mine", b"x" * 100_000)
    return f"ember://{store}"


def names_in(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir())


def test_it_measures_and_leaves_nothing_behind(url: str, store: Path) -> None:
    before = names_in(store)
    rows = emberline_json(*QUICK, url)
    assert len(rows) == 11
    for row in rows:
        assert row["store"] > 0 and row["ceiling"] > 0
        assert row["limit"] in LIMITS and 0 < row["limit_share"] <= 1
        assert row["limit"] == max(row["parts_s"], key=row["parts_s"].get)
    assert emberline("fs", "ls", f"{url}/!/").stdout == "mine\n"
    assert names_in(store) == before
    with emberfs.connect(url) as client:
        assert client.space()["used_bytes"] < MIB


def test_the_table_names_the_limit_and_help_says_what_it_is(url: str) -> None:
    lines = emberline(*QUICK, "--threads", 2, url).stdout.splitlines()
    assert len(lines) == 12
    assert all(any(f"{limit} " in line for limit in LIMITS) and "%" in line for line in lines[1:])
    text = emberline("bench", "--help").stdout
    assert all(f"  {limit} " in text for limit in LIMITS)


def test_without_a_store_a_temporary_one_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(emberline_json(*QUICK)) == 11
    assert list(tmp_path.iterdir()) == []


def test_the_store_of_the_environment_is_measured(url: str) -> None:
    assert f"measuring {url}" in emberline(*QUICK, "--json", store=url).stderr


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert "no store here" in emberline(*QUICK, f"ember://{tmp_path}/none", code=1).stderr
    assert list(tmp_path.iterdir()) == []


def test_a_shared_store_is_measured_at_its_server(url: str, store: Path) -> None:
    with no_server_left(store), emberfs.connect(url) as client:
        process = start_emberline(*QUICK, "--json", url)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert len(output.splitlines()) == 11
        assert [name for name, _ in client.list("/")] == ["mine"]


def test_an_interrupt_cleans_up(url: str, store: Path) -> None:
    before = names_in(store)
    process = start_emberline("bench", "--seconds", 30, "--size", "2m", url)
    assert b"measuring" in process.stderr.readline()  # type: ignore[union-attr]
    deadline_s = time.monotonic() + 60
    while names_in(store) == before and time.monotonic() < deadline_s:
        time.sleep(0.01)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # Whoever is impatient presses it twice.
    _, errors = process.communicate(timeout=60)
    # The second one may come when all is done: while the first is told of, or as the interpreter ends.
    is_aborted = process.returncode == 1 and errors.endswith(b"Aborted!\n")
    assert is_aborted or process.returncode in (130, -signal.SIGINT), errors
    assert emberline("fs", "ls", f"{url}/!/").stdout == "mine\n"
    assert names_in(store) == before


def test_wrong_bytes_are_found(client: Client, tmp_path: Path) -> None:
    client.mkdir("/scratch")
    (tmp_path / "plain").mkdir()
    work = Work(client, "/scratch", tmp_path / "plain", size=2 * MIB, threads=1)
    with work.jobs() as jobs:
        write, read = jobs[0](), jobs[5]()
        write.store(0, 0)
        write.verify()
        read.verify()
        for path in ("/scratch/write-1048576", "/scratch/read"):
            client.batch_write([(path, 0, bytes(MIB))])
        for job in (write, read):
            with pytest.raises(Corruption):
                job.verify()


# ---- what limits


@given(
    st.builds(Shares, client=SECONDS, network=SECONDS, queue=SECONDS, disk=SECONDS, work=SECONDS),
    st.builds(Ceilings, crc_s=SECONDS, copy_s=SECONDS, socket_s=SECONDS),
    SECONDS,
    st.booleans(),
    st.booleans(),
)
def test_the_parts_add_up(shares: Shares, ceilings: Ceilings, plain_s: float, reads: bool, has_servers: bool) -> None:
    parts = parts_of(shares, ceilings, plain_s=plain_s, pieces=1, reads=reads, has_servers=has_servers)
    assert sum(parts.values()) == pytest.approx(shares.total, abs=1e-6)
    assert min(parts.values()) >= 0
    assert parts[limit_of(parts)] == max(parts.values())


@pytest.mark.parametrize(
    ("shares", "plain_s", "reads", "limit"),
    [
        (Shares(disk=9, client=1), 5.0, False, "disk"),
        (Shares(disk=9, client=1), 5.0, True, "disk"),
        (Shares(disk=9, client=1), 0.2, True, "copy"),
        (Shares(disk=1, client=5), 0.2, True, "cpu"),
        (Shares(disk=1, queue=5, work=1), 0.2, True, "cpu"),
        (Shares(disk=1, network=5), 0.2, True, "latency"),
        (Shares(disk=1, network=2), 0.2, True, "network"),
        (Shares(disk=0.3, client=0.1), 0.2, True, "crc"),
        (Shares(client=0.4), 0.2, False, "crc"),
    ],
)
def test_the_largest_part_is_the_limit(shares: Shares, plain_s: float, reads: bool, limit: str) -> None:
    ceilings = Ceilings(crc_s=0.25, copy_s=0.1, socket_s=1.5)
    parts = parts_of(shares, ceilings, plain_s=plain_s, pieces=1, reads=reads, has_servers=False)
    assert limit_of(parts) == limit


# ---- ceilings


def test_ceilings_are_measured_by_all_threads() -> None:
    seen: set[int] = set()

    def side(thread: int, turn: int) -> bool:
        seen.add(thread)
        return turn < 3

    assert Pace(seconds=5.0, threads=3).rate(side) > 0
    assert seen == {0, 1, 2}
    ceilings = measure_ceilings(Pace(seconds=0.01, threads=2), 4096, 4)
    assert min(ceilings.crc_s, ceilings.copy_s, ceilings.socket_s) > 0


def test_an_error_in_one_thread_ends_all() -> None:
    def side(thread: int, turn: int) -> None:
        if thread:
            raise ZeroDivisionError
        time.sleep(0.001)

    before = threading.active_count()  # Other tests' stores may still have their workers.
    begin_s = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        Pace(seconds=1.0, threads=2).rate(side)
    assert time.monotonic() - begin_s < 30
    assert threading.active_count() <= before
