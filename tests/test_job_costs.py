"""What jobs cost and what they made, as the benchmarks of dataflow see it.

Run: pytest tests/test_job_costs.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.dataflow.outputs import check_partitioned, check_same_results, check_sorted
from benchmarks.process import Cost, Job, JobFailed, cost_row, cpu_s, interleave, run_job, wall_s
from benchmarks.records import Dataset, make_dataset, read_records, write_records
from benchmarks.runner import OURS, WrongResult

BURNT_S = 0.3
BURN = f"import time\nwhile time.process_time() < {BURNT_S}: pass"
"""In each process that does it."""


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


# ---- costs


def test_the_cpu_of_every_process_counts() -> None:
    """Its own, that of a child that it waits for, and that of a daemon that it leaves behind."""
    crowd = f"""
import os, subprocess, sys
subprocess.run([sys.executable, "-S", "-c", {BURN!r}])
reading, writing = os.pipe()
if os.fork() == 0:
    os.setsid()
    exec({BURN!r})
    os.close(writing)
    time.sleep(300)
os.close(writing)
os.read(reading, 1)
{BURN}
"""
    assert run_job(Job(command=python(crowd))).cpu_s > 2.9 * BURNT_S


def test_the_cpu_of_a_process_that_nobody_waits_for_counts() -> None:
    """The kernel forgets it: it was seen while it was there."""
    forgetful = f"""
import os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
reading, writing = os.pipe()
if os.fork() == 0:
    exec({BURN!r})
    time.sleep(1)
    os._exit(0)
os.close(writing)
os.read(reading, 1)
"""
    assert run_job(Job(command=python(forgetful))).cpu_s > 0.9 * BURNT_S


def test_a_daemon_is_asked_to_end() -> None:
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(300)\n"
    assert run_job(Job(command=python(daemon))).wall_s < 300


def test_memory_is_told_apart() -> None:
    code = """
import subprocess, sys
mine = bytearray(40 << 20)
subprocess.run([sys.executable, "-S", "-c", "import time; much = bytearray(80 << 20); time.sleep(1)"])
"""
    pss_bytes = run_job(Job(command=python(code), watches_memory=True)).pss_bytes
    assert 80 << 20 < pss_bytes["below"] < 120 << 20
    assert 40 << 20 < pss_bytes["main"] < 80 << 20
    assert pss_bytes["beside"] == 0


def test_what_a_job_tells_is_a_line_of_json() -> None:
    job = Job(command=python("print('starting'); print('{\"rows\": 3}'); print('bye')"))
    assert run_job(job).told == {"rows": 3}
    assert run_job(replace(job, command=python("print('nothing')"))).told == {}


def test_a_job_that_fails_says_why() -> None:
    with pytest.raises(JobFailed, match="no luck"):
        run_job(Job(command=python("raise SystemExit('no luck')")))


def test_jobs_take_turns_and_are_checked_once_with_their_outputs_removed(tmp_path: Path) -> None:
    order: list[str] = []

    def job(name: str) -> Job:
        output = tmp_path / name
        return Job(command=python(f"open({str(output)!r}, 'x')"), outputs=[output], check=lambda: order.append(name))

    costs = interleave({"ours": job("ours"), "peer": job("peer")}, 2)
    assert order == ["ours", "peer"]
    assert [len(each) for each in costs.values()] == [2, 2]


def cost(wall: float, cpu: float) -> Cost:
    return Cost(wall_s=wall, cpu_s=cpu, pss_bytes={})


def test_a_row_of_costs_is_paired_by_round() -> None:
    costs = {OURS: [cost(1, 2), cost(3, 9), cost(2, 4)], "DuckDB": [cost(2, 2), cost(2, 3), cost(2, 1)]}
    row = cost_row("sort, CPU s", cpu_s, costs, peers=["Polars"], baseline="DuckDB", goal=3.0)
    assert (row.ours, row.peers, row.ratio, row.met) == (4, {"DuckDB": 2}, 3.0, True)
    assert (row.seconds["ours"].wall, row.seconds["DuckDB"].cpu) == (2, 2)
    assert cost_row("sort, s", wall_s, costs, goal=2.5).met, "without a baseline the goal is for the number"


def test_without_the_baseline_there_is_no_goal() -> None:
    row = cost_row("sort, CPU s", cpu_s, {OURS: [cost(1, 2)]}, baseline="smallpond", goal=0.2)
    assert (row.ratio, row.goal, row.met) == (None, None, None)


# ---- what jobs made


@pytest.fixture
def records(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "records", 2000, files=2)


def test_outputs_that_are_not_sorted_or_not_whole_are_found(records: Dataset, tmp_path: Path) -> None:
    everything = pa.concat_tables(map(pq.read_table, records.files)).sort_by("key")
    output = tmp_path / "sorted"
    output.mkdir()
    pq.write_table(everything[:700], output / "a.parquet")
    pq.write_table(everything[700:], output / "b.parquet")
    check_sorted(output, records)
    (output / "a.parquet").rename(output / "c.parquet")
    check_sorted(output, records, by_names=False)
    with pytest.raises(WrongResult, match="is not sorted"):
        check_sorted(output, records)
    (output / "c.parquet").unlink()
    with pytest.raises(WrongResult, match="does not hold the records"):
        check_sorted(output, records)


def test_partitions_are_all_there_and_even(records: Dataset, tmp_path: Path) -> None:
    output = tmp_path / "parts"
    for number, source in enumerate(records.files):
        (output / f"part={number}").mkdir(parents=True)
        write_records(str(output / f"part={number}" / "x.parquet"), read_records(source))
    check_partitioned(output, records, parts=2)
    with pytest.raises(WrongResult, match="has 2 parts, not 3"):
        check_partitioned(output, records, parts=3)
    everything = pa.concat_tables(map(pq.read_table, records.files))
    pq.write_table(everything[:1900], output / "part=0" / "x.parquet")
    pq.write_table(everything[1900:], output / "part=1" / "x.parquet")
    with pytest.raises(WrongResult, match="uneven"):
        check_partitioned(output, records, parts=2)


def test_results_are_the_same_but_for_order_and_last_digits(tmp_path: Path) -> None:
    for side in ("ours", "theirs"):
        (tmp_path / side).mkdir()
    table = pa.table({"k": ["a", "b", None], "n": [1, 2, 3], "x": [0.1 + 0.2, 1e300, None]})
    other = pa.table({"k": [None, "b", "a"], "n": [3, 2, 1], "x": [None, 1e300, 0.3]})
    pq.write_table(table, tmp_path / "ours" / "q.parquet")
    pq.write_table(other, tmp_path / "theirs" / "q.parquet")
    check_same_results(tmp_path / "ours", tmp_path / "theirs", ["q"])
    pq.write_table(other.set_column(2, "x", [[None, 1e300, 0.3001]]), tmp_path / "theirs" / "q.parquet")
    with pytest.raises(WrongResult, match="is not"):
        check_same_results(tmp_path / "ours", tmp_path / "theirs", ["q"])
    pq.write_table(other[:2], tmp_path / "theirs" / "q.parquet")
    with pytest.raises(WrongResult, match="3 rows, not 2"):
        check_same_results(tmp_path / "ours", tmp_path / "theirs", ["q"])
