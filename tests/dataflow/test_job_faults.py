"""Jobs whose workers, driver or intermediates are lost on the way give the rows they would have given.

Run: pytest tests/dataflow/test_job_faults.py. EMBERFLOW_KILLS=20 kills a driver, and workers, at as many moments.
"""

from __future__ import annotations

import glob
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emberflow
import pytest

KILLS = int(os.environ.get("EMBERFLOW_KILLS", "2"))

DRIVER = """
import json, sys
import emberflow

def slow(table):
    # Long enough to be hit, and the same each time.
    return table.append_column("twice", [[2 * k for k in table.column("k").to_pylist()]])

files, root, out = sys.argv[1:]
with emberflow.init(executor="local", workers=2, data_root=root, memory_limit="2GB") as session:
    rows = session.read_parquet(files).repartition(6, hash_by="s")
    schema = {"k": "BIGINT", "h": "BIGINT", "s": "VARCHAR", "twice": "BIGINT"}
    summed = rows.map_batches(slow, schema=schema, version="1")
    frame = summed.repartition(3, hash_by="h").partial_sql(
        "select h, sum(twice) total, count(*) n, string_agg(s order by k) s from {0} group by h order by h"
    )
    frame.write_parquet(out, mode="overwrite")
    events = session.jobs.last
    print(json.dumps({"reused": sum(e.data["reused"] for e in events if e.kind == "stage")}))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("files")
    with emberflow.init(threads=1) as session:
        for part in range(4):
            text = f"select range k, range % 5 h, 'x' || range s from range({part * 30_000}, {part * 30_000 + 30_000})"
            session.sql(text).write_parquet(f"{directory}/{part}.parquet")
    return str(directory)


def expected(files: str) -> list[dict[str, Any]]:
    with emberflow.init() as session:
        return session.sql(
            "select h, sum(2 * k) total, count(*) n, string_agg(s order by k) s "
            f"from '{files}/*.parquet' group by h order by h"
        ).take_all()


def result(out: str) -> list[dict[str, Any]]:
    with emberflow.init() as session:
        return session.read_parquet(out).sort("h").take_all()


def driver(files: str, root: str, out: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, files, root, out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def workers_of(pid: int) -> list[int]:
    """The worker processes of a driver that are alive."""
    found = []
    for directory in glob.glob("/proc/[0-9]*"):
        try:
            with open(f"{directory}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            with open(f"{directory}/cmdline") as file:
                command = file.read()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z" and "emberflow" in command:
            found.append(int(directory.rpartition("/")[2]))
    return found


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"still alive: {pids}"
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_job_whose_driver_is_ended_goes_on_from_there(files: str, tmp_path: Path, how: signal.Signals) -> None:
    out = f"{tmp_path}/out"
    want = expected(files)
    chance = random.Random(how)
    for kill in range(KILLS):
        root = f"{tmp_path}/root-{kill}"
        process = driver(files, root, out)
        pids: list[int] = []
        moment = time.monotonic() + chance.uniform(0.3, 3.0)
        while time.monotonic() < moment and process.poll() is None:
            pids = sorted({*pids, *workers_of(process.pid)})
            time.sleep(0.02)
        process.send_signal(how)
        process.communicate(timeout=60)
        wait_until_gone(pids)
        done = len(glob.glob(f"{root}/steps/*/*.won"))
        again = driver(files, root, out)
        output, error = again.communicate(timeout=120)
        assert again.returncode == 0, error.decode()
        reused = json.loads(output)["reused"]
        # What the write has moved into place counts no more.
        assert reused <= done
        assert result(out) == want
        assert [name for name in os.listdir(tmp_path) if name.startswith(".emberflow-")] == []


def test_workers_that_are_killed_cost_time_and_nothing_else(files: str, tmp_path: Path) -> None:
    want = expected(files)
    chance = random.Random(5)
    for kill in range(KILLS):
        process = driver(files, f"{tmp_path}/root-{kill}", f"{tmp_path}/out")
        killed = 0
        while process.poll() is None:
            pids = workers_of(process.pid)
            # A task may be run four times, so two kills never end a job.
            if pids and killed < 2 and chance.random() < 0.3:
                os.kill(chance.choice(pids), signal.SIGKILL)
                killed += 1
            time.sleep(0.1)
        output, error = process.communicate()
        assert process.returncode == 0, error.decode()
        assert json.loads(output)["reused"] == 0
        assert result(f"{tmp_path}/out") == want


@pytest.fixture
def root(tmp_path: Path) -> Iterator[str]:
    yield f"{tmp_path}/root"


def groups(session: emberflow.Session, files: str) -> list[dict[str, Any]]:
    parted = session.read_parquet(files).repartition(3, hash_by="h")
    return parted.partial_sql("select h, count(*) n, sum(k) total from {0} group by h order by h").take_all()


def spoil(path: str, damage: str) -> None:
    if damage == "remove":
        os.unlink(path)
        return
    with open(path, "r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        if damage == "flip":
            file.write(bytes([byte ^ 0x10]))
        else:
            file.truncate(1000)


@pytest.mark.parametrize(("together_bytes", "tasks"), [(-1, 6), (3800, 3)])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_intermediate_that_neighbours_read_is_made_again(
    files: str, root: str, damage: str, together_bytes: int, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emberflow.jobs.TOGETHER_BYTES", together_bytes)
    config: dict[str, Any] = {"executor": "inline", "data_root": root, "shuffle": "always", "partitions": 6}

    def grouped() -> tuple[list[dict[str, Any]], list[emberflow.job.Event]]:
        with emberflow.init(partition_bytes=100_000, **config) as session:
            text = "select k % 100 m, count(*) n, sum(k) total from f group by m"
            rows = session.sql(text, f=session.read_parquet(files)).take_all()
            return sorted(rows, key=str), session.jobs.last

    want, events = grouped()
    assert [event.data["tasks"] for event in events if event.kind == "stage"][1:] == [tasks]
    damaged = max(glob.glob(f"{root}/steps/*/*.exchange"), key=os.path.getsize)
    # The result goes, so that somebody reads what is damaged.
    for won in set(glob.glob(f"{root}/steps/*/*.won")) - set(glob.glob(f"{os.path.dirname(damaged)}/*.won")):
        os.unlink(won)
    spoil(damaged, damage)
    again, events = grouped()
    assert again == want
    assert [event.kind for event in events].count("recompute") == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_intermediate_is_made_again(files: str, root: str, damage: str) -> None:
    with emberflow.init(executor="inline", data_root=root) as session:
        want = sorted(groups(session, files), key=str)
    # The result's step goes too, so that somebody reads what is damaged.
    for won in glob.glob(f"{root}/steps/*/*.won"):
        data = glob.glob(f"{won[: -len('.won')]}-*.exchange")[0]
        if os.path.getsize(data) < 100_000:
            os.unlink(won)
    damaged = max(glob.glob(f"{root}/steps/*/*.exchange"), key=os.path.getsize)
    spoil(damaged, damage)
    with emberflow.init(executor="inline", data_root=root) as session:
        assert sorted(groups(session, files), key=str) == want
        assert [event.kind for event in session.jobs.last].count("recompute") == 1


def test_a_job_that_takes_too_long_is_cancelled(files: str) -> None:
    def endless(row: dict[str, Any]) -> dict[str, Any]:
        while True:
            time.sleep(0.01)

    with emberflow.init(executor="local", workers=1, timeout_s=1.5) as session:
        with pytest.raises(emberflow.CallCancelled, match="longer than 1\\.5 s"):
            session.read_parquet(files).map(endless).count()
        pids = workers_of(os.getpid())
    wait_until_gone(pids)


def test_damage_that_is_met_after_rows_were_given_out(root: str) -> None:
    """Whether rows were depends on how far DuckDB reads ahead; either way all of them are there once."""
    with emberflow.init(executor="inline", shuffle="always", data_root=root) as session:
        frame = session.sql("SELECT i, hash(i) AS h FROM range(1000000) t(i)").repartition(2, hash_by="i").compute()
        damaged = max(glob.glob(f"{root}/steps/*/*.exchange"), key=os.path.getmtime)
        with open(damaged, "r+b") as file:
            file.seek(-os.path.getsize(damaged) // 3, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0x10]))
        assert frame.to_arrow().num_rows == 1000000
